"""Whether a database can feed changes at all, asked once before the feed starts.

The feed itself waits out whatever trouble comes later; what will never mend by waiting is told here.
"""

import asyncpg


async def problem_with(dsn: str, publication: str) -> str | None:
    """Return what keeps the feed from working with a database, on one line; None if nothing does."""
    try:
        connection = await asyncpg.connect(dsn, timeout=10)
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        lines = str(error).splitlines()
        return f"the database cannot be reached: {lines[0] if lines else type(error).__name__}"
    try:
        level, allowed, exists = await connection.fetchrow(
            "select current_setting('wal_level'), "
            "(select rolsuper or rolreplication from pg_roles where rolname = current_user), "
            "exists (select from pg_publication where pubname = $1)",
            publication,
        )
    finally:
        await connection.close()
    if level != "logical":
        return f"wal_level is {level}: set it to logical and restart Postgres"
    if not allowed:
        return "the database user may not replicate: alter role … replication, or use a superuser"
    if not exists:
        return f"there is no publication {publication}: create publication {publication}"
    return None
