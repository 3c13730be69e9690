"""Alembic environment of the schema `tailrace`.

It knows no model classes: the tables are written down in the revisions and used through SQL text, because
they are few, small and hot. Its version table lives in `tailrace` too, so that it stays apart from the
user's own Alembic and from the migrations of the Supabase CLI.
"""

from typing import Any

from alembic import context

VERSION_TABLE = "migration"
SCHEMA = "tailrace"


def run() -> None:
    """Run the revisions on the connection handed over, or print their SQL."""
    connection = context.config.attributes.get("connection")
    options: dict[str, Any] = {
        "version_table": context.config.get_main_option("version_table", VERSION_TABLE),
        "version_table_schema": SCHEMA,
        "include_schemas": True,
        "transaction_per_migration": False,
    }
    if connection is None:
        context.configure(dialect_name="postgresql", literal_binds=True, **options)
        context.execute(f"create schema if not exists {SCHEMA}")
    else:
        context.configure(connection=connection, **options)
    with context.begin_transaction():
        context.run_migrations()


run()
