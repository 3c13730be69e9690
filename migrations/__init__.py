"""Alembic environment of Tailrace's own tables; the user's tables have theirs."""
