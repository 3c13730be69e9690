"""Sessions of processes that were frozen in the middle of a statement, and what they keep locked.

Postgres ends a transaction that is idle for too long. But between preparing a statement and running it a
session is not idle to Postgres, it waits for the rest of the statement: a process that is frozen just there
would keep its locks for ever, and no limit that a server before version 17 knows would end it. Whoever is in
want of such a lock ends the session. Pure SQL; works through poolers.
"""

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

log = structlog.get_logger(__name__)

# Sessions of other users are not ours to end, nor those that only look.
_END = text(
    "select pg_terminate_backend(a.pid) from pg_stat_activity a"
    " where a.datname = current_database() and a.usename = current_user and a.pid <> pg_backend_pid()"
    " and a.state = 'active' and a.wait_event = 'ClientRead'"
    " and a.query_start < clock_timestamp() - make_interval(secs => :seconds)"
    " and exists (select from pg_locks l join pg_class c on c.oid = l.relation"
    "  where l.pid = a.pid and l.granted and l.mode in ('RowShareLock', 'RowExclusiveLock')"
    "  and c.relnamespace = cast('tailrace' as regnamespace))"
)


async def end_frozen(connection: AsyncConnection, seconds: float) -> None:
    """End what has been in the middle of a statement for so long, and may keep rows that others need.

    Args:
        connection: whose user has the session.
        seconds: for which its process has said nothing.
    """
    ended = len((await connection.execute(_END, {"seconds": seconds})).all())
    if ended:
        log.warning("ended the session of a process that is frozen", sessions=ended)
