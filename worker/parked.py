"""Changes that wait in Postgres because their lane lags too far behind or its handler is paused.

Rows of tailrace.held, like those that wait for a retry (held.py): they leave the lane with its position and
are applied from here, in the order of their ids, before anything that stands in the lane. One that meets an
earlier held change of its keys waits behind that one, as a held change does.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.change import Position
from worker.held import HeldRow, Kept, from_row, to_row
from worker.lanes import Lane

_INSERT = text(
    "insert into tailrace.held (handler, lanes, keys, lsn, ordinal, source, payload, changes, status)"
    " values (:handler, :lanes, :keys, :lsn, :ordinal, :source, :payload, :changes, 'parked')"
)
# A key that waits already stands for the further changes too.
_INSERT_KEYS = text(
    "with given as ("
    "  select key, changes from unnest(cast(:keys as text[]), cast(:changes as integer[])) g (key, changes)),"
    " known as (select k as key, min(h.id) as id from tailrace.held h, unnest(h.keys) k"
    "  where h.handler = :handler and h.waits and h.keys && cast(:keys as text[])"
    "  and k = any(cast(:keys as text[])) group by k),"
    " first as (select key, changes, id from given left join known using (key)),"
    " absorbed as ("
    "  update tailrace.held h set changes = h.changes + first.changes from first where h.id = first.id)"
    " insert into tailrace.held (handler, lanes, keys, lsn, ordinal, source, payload, changes, status)"
    " select :handler, array[cast(:lane as integer)], array[key], :lsn, :ordinal, 'key', '', changes,"
    " 'parked'"
    " from first where id is null returning id"
)
_FIRST = text(
    "select first.* from unnest(cast(:lanes as integer[])) l, lateral ("
    "  select id, lanes, keys, lsn, ordinal, source, payload, changes, attempts, redriven,"
    "   history from tailrace.held"
    "  where handler = :handler and lanes[1] = l and status = 'parked' order by id limit :most) first"
    " order by id limit :most"
)
# By id: most keys have many rows that come later, so that to look for keys would read nearly all that waits.
_BEFORE = text(
    "select k, min(id) filter (where waits_long), min(id) filter (where not waits_long) from ("
    " select h.id, h.keys, h.waits_long from tailrace.held h where h.handler = :handler"
    "  and h.waits and h.id <= :last and h.id <> all (cast(:ids as bigint[])) offset 0) found,"
    " unnest(keys) k where k = any (cast(:keys as text[])) group by k"
)
_WALL = text(
    "select id, waits_long from tailrace.held where handler = :handler and waits and keys = '{}'"
    " order by id limit 1"
)
_TO_HELD = text(
    "update tailrace.held set status = 'retrying',"
    " next_attempt_at = case when :due then clock_timestamp() end where id = any(cast(:ids as bigint[]))"
)
# A run of each key, from its first row on: rows that have not failed themselves, and need no other lane.
_FROM_HELD = text(
    "with waiting as (select k, h.id, h.status = 'retrying' and h.attempts = 0 and not h.redriven"
    "   and h.next_attempt_at is null and h.lanes = array[cast(:lane as integer)]"
    "   and cardinality(h.keys) = 1 as free"
    "  from unnest(cast(:keys as text[])) k join tailrace.held h"
    "   on h.handler = :handler and h.waits and h.keys @> array[k]),"
    " walls as (select k, min(id) as id from waiting where not free group by k)"
    " update tailrace.held set status = 'parked' where id in ("
    "  select w.id from waiting w left join walls on walls.k = w.k where w.free"
    "   and (walls.id is null or w.id < walls.id) and not exists (select from tailrace.held e"
    "    where e.handler = :handler and e.waits and e.keys = '{}' and e.id < w.id)"
    "  order by w.id limit :most)"
    " returning id"
)
# The earlier one is locked without waiting: whoever is just letting it go has already looked for what waits.
_LET_WAIT = text(
    "update tailrace.held set next_attempt_at = null where id in ("
    " select h.id from tailrace.held h cross join lateral (select from tailrace.held e"
    "  where e.handler = h.handler and e.waits and e.waits_long and e.id < h.id and e.keys && h.keys"
    "  order by e.id limit 1 for key share nowait) earlier"
    " where h.handler = :handler and h.status = 'retrying' and h.attempts = 0"
    "  and h.next_attempt_at <= clock_timestamp() order by h.id limit :most for update of h skip locked)"
)
_ANY_LONG = text("select exists (select from tailrace.held where handler = :handler and waits_long)")
_AGAIN = text(
    "update tailrace.held set status = 'parked', next_attempt_at = null"
    " where id = any(cast(:ids as bigint[]))"
)
MOST_AT_ONCE = 100
_DELETE = text("delete from tailrace.held where id = any(cast(:ids as bigint[]))")
_LANES = text(
    "select l.handler, l.lane from tailrace.lanes l join tailrace.handlers h on h.name = l.handler"
    " where l.parked > 0 and h.state = 'active' and not h.paused"
)


async def park(session: AsyncSession, handler: str, changes: Sequence[Kept]) -> None:
    """Park changes, in their order; the session holds the locks of their lanes."""
    connection = await session.connection()
    await connection.execute(_INSERT, [to_row(handler, kept) for kept in changes])


async def park_keys(session: AsyncSession, lane: Lane, counts: Mapping[bytes, int], at: Position) -> int:
    """Park keys of a derive handler, each with the number of changes behind it; return how many are new."""
    connection = await session.connection()
    found = await connection.execute(
        _INSERT_KEYS,
        {
            "handler": lane.handler,
            "lane": lane.number,
            "keys": [key.decode() for key in counts],
            "changes": list(counts.values()),
            "lsn": at.lsn,
            "ordinal": at.ordinal,
        },
    )
    return len(found.all())


async def first(session: AsyncSession, handler: str, lanes: Sequence[int], most: int) -> list[HeldRow]:
    """Read the first rows that some lanes are to apply, in the order of their ids."""
    connection = await session.connection()
    parameters = {"handler": handler, "lanes": list(lanes), "most": most}
    return [from_row(row) for row in await connection.execute(_FIRST, parameters)]


class Before(NamedTuple):
    """For keys of some rows, the id of the first row that waits with that key and is none of them."""

    held: Mapping[bytes, int]
    """Held: for a while, for a person, or behind another one."""
    moving: Mapping[bytes, int]
    """Parked, or held and due: it will be applied as soon as somebody comes to it."""


async def before(session: AsyncSession, handler: str, rows: Sequence[HeldRow]) -> Before:
    """Find what waits with the keys of some rows, with ids not above theirs, besides themselves."""
    connection = await session.connection()
    parameters = {
        "handler": handler,
        "keys": sorted({key.decode() for row in rows for key in row.kept.keys}),
        "ids": [row.id for row in rows],
        "last": max(row.id for row in rows),
    }
    found = (await connection.execute(_BEFORE, parameters)).all()
    return Before(
        {row[0].encode(): row[1] for row in found if row[1] is not None},
        {row[0].encode(): row[2] for row in found if row[2] is not None},
    )


class Wall(NamedTuple):
    """A change of all keys that waits: later ones of any lane are behind it."""

    id: int
    waits_long: bool
    """It has failed, or a person has to decide."""


async def wall(session: AsyncSession, handler: str) -> Wall | None:
    """Find the first change of all keys that waits."""
    connection = await session.connection()
    row = (await connection.execute(_WALL, {"handler": handler})).one_or_none()
    return None if row is None else Wall(row[0], row[1])


async def to_held(session: AsyncSession, ids: Sequence[int], *, due: bool) -> None:
    """Let rows wait as held ones from now on: due at once, or behind an earlier one of their keys."""
    connection = await session.connection()
    await connection.execute(_TO_HELD, {"ids": list(ids), "due": due})


async def from_held(session: AsyncSession, lane: Lane, keys: Sequence[bytes], most: int) -> int:
    """Let what waits behind keys that are free now be applied as parked changes are: together.

    Args:
        session: holds the lane's row.
        lane: only rows that concern no other.
        keys: nothing of them is being retried.
        most: rows at once; the rest waits behind them.

    Returns:
        How many.
    """
    connection = await session.connection()
    parameters = {"handler": lane.handler, "lane": lane.number, "most": most}
    found = await connection.execute(_FROM_HELD, parameters | {"keys": [key.decode() for key in keys]})
    return len(found.all())


async def again(session: AsyncSession, ids: Sequence[int]) -> None:
    """Park held rows again that have never failed: they are applied with all that is parked."""
    connection = await session.connection()
    await connection.execute(_AGAIN, {"ids": list(ids)})


async def let_wait(session: AsyncSession, handler: str) -> None:
    """Let held rows that are due, but behind a row that waits for long, wait for that one.

    Otherwise they would pass for rows that are on their way, and all behind them would stay parked.

    Raises:
        sqlalchemy.exc.DBAPIError: such a row is being let go just now (the lane is busy).
    """
    connection = await session.connection()
    if (await connection.execute(_ANY_LONG, {"handler": handler})).scalar_one():
        await connection.execute(_LET_WAIT, {"handler": handler, "most": MOST_AT_ONCE})


async def let_go(session: AsyncSession, ids: Sequence[int]) -> None:
    """Forget rows: they are applied."""
    connection = await session.connection()
    await connection.execute(_DELETE, {"ids": list(ids)})


async def waiting_lanes(connection: AsyncConnection) -> list[Lane]:
    """List the lanes that have parked changes to apply."""
    return [Lane(row[0], row[1]) for row in await connection.execute(_LANES)]
