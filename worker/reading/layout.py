"""Which handlers and lanes exist, as Postgres knows them; changed only by the listener that has the lease.

A new handler starts at the present. One that is no longer there is orphaned and pins nothing; one that comes
back has missed changes, and that is recorded as a gap. The number of lanes decides which lane a key is in, so
it changes only when nothing is under way in any lane.
"""

from collections.abc import Sequence

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker import gaps
from worker.change import Position
from worker.paging import rewind
from worker.registry import Handler

log = structlog.get_logger(__name__)

_UPSERT = text(
    "insert into tailrace.handlers (name, kind, tables) values (:name, :kind, cast(:tables as text[]))"
    " on conflict (name) do update set kind = excluded.kind, tables = excluded.tables, state = 'active',"
    " orphaned_at = null"
)
_ROWS = text(
    "insert into tailrace.lanes (handler, lane, lsn, ordinal)"
    " select :name, n, :lsn, :ordinal from generate_series(0, :lanes - 1) n on conflict do nothing"
)
_FORWARD = text(
    "update tailrace.lanes set lsn = :lsn, ordinal = :ordinal, arrived_lsn = null, arrived_ordinal = null"
    " where handler = :name"
)
_ORPHAN = text(
    "update tailrace.handlers set state = 'orphaned', orphaned_at = clock_timestamp()"
    " where state = 'active' and name <> all (cast(:names as text[])) returning name"
)
# What the lanes that go have applied is counted on by those that stay.
_SHRINK = text(
    "with gone as (delete from tailrace.lanes where lane >= :lanes returning handler, read, applied)"
    " update tailrace.lanes l set read = l.read + g.read, applied = l.applied + g.applied"
    " from (select handler, sum(read) as read, sum(applied) as applied from gone group by handler) g"
    " where l.handler = g.handler and l.lane = 0"
)
_ORPHANED = text("select orphaned_at from tailrace.handlers where name = :name and state = 'orphaned'")


async def agree(
    connection: AsyncConnection,
    handlers: Sequence[Handler],
    wanted: int,
    present: Position,
    *,
    resumed: Position,
    settled: bool,
) -> int:
    """Bring the tables into line with the handlers that are loaded, in the caller's transaction.

    Args:
        connection: in a transaction of the listener that has the lease.
        handlers: all that are loaded.
        wanted: lanes per handler, as the settings have it.
        present: where new handlers start.
        resumed: where new lanes of known handlers start.
        settled: whether nothing is under way in Redis.

    Returns:
        The number of lanes in force, which is not the wanted one while anything is under way.
    """
    lanes = await _lanes(connection, wanted, settled=settled)
    orphans = [row[0] for row in await connection.execute(_ORPHAN, {"names": [one.name for one in handlers]})]
    for name in orphans:
        log.warning("handler is orphaned: it is no longer loaded", handler=name)
    known = {row[0] for row in await connection.execute(text("select name from tailrace.handlers"))}
    for handler in handlers:
        since = (await connection.execute(_ORPHANED, {"name": handler.name})).scalar_one_or_none()
        tables = sorted({(one.schema, one.table) for one in handler.subscriptions})
        names = [f"{schema}.{table}" for schema, table in tables]
        await connection.execute(_UPSERT, {"name": handler.name, "kind": handler.kind, "tables": names})
        start = present if handler.name not in known else resumed
        where = {"name": handler.name, "lsn": start.lsn, "ordinal": start.ordinal}
        await connection.execute(_ROWS, where | {"lanes": lanes})
        if since is not None:
            where = {"name": handler.name, "lsn": present.lsn, "ordinal": present.ordinal}
            await connection.execute(_FORWARD, where)
            await rewind(connection, handler.name)
            cause = f"handler {handler.name} was not loaded"
            await gaps.record(connection, cause=cause, tables=tables, since=since)
    return lanes


async def _lanes(connection: AsyncConnection, wanted: int, *, settled: bool) -> int:
    current: int | None = (await connection.execute(text("select lanes from tailrace.source"))).scalar_one()
    if current == wanted:
        return wanted
    if current is not None:
        held = (
            await connection.execute(text("select exists (select from tailrace.held where waits)"))
        ).scalar_one()
        if held or not settled:
            log.warning(
                "number of lanes is kept: changes are under way or held", wanted=wanted, in_force=current
            )
            return current
        await connection.execute(_SHRINK, {"lanes": wanted})
    await connection.execute(text("update tailrace.source set lanes = :lanes"), {"lanes": wanted})
    return wanted
