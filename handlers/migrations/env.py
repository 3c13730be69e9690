"""Alembic environment of the example's derived tables.

Copy it beside your own: a version table of its own keeps it apart from every other Alembic in the database.
`python -m worker migrate` hands over the connection.
"""

from alembic import context

VERSION_TABLE = "handlers_version"

connection = context.config.attributes.get("connection")
if connection is None:
    context.configure(dialect_name="postgresql", literal_binds=True, version_table=VERSION_TABLE)
else:
    context.configure(connection=connection, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
