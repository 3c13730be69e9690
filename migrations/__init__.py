"""Alembic environment of Tailrace's own tables; the user's tables have theirs."""

HEAD = "0001"
"""The revision that this version needs; a test holds it against the files."""
