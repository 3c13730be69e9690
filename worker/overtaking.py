"""Dead letters that newer changes of their keys have overtaken: who redrives one is told of them.

Noted in the transaction that applies the newer change, and only at the last dead letter before it: a key may
have thousands. What was applied after an earlier one is the sum of what is noted from it on.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, TypedDict

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.change import Position

# In the order of positions, each applied change of a key belongs to the dead letter of the key before it.
_NOTE = text(
    "with applied as (select * from unnest(cast(:keys as text[]), cast(:lsns as bigint[]),"
    "  cast(:ordinals as bigint[])) g (key, lsn, ordinal)),"
    " known as (select k.key, d.lsn, d.ordinal, d.id from tailrace.held d, unnest(d.keys) k (key)"
    "  where d.handler = :handler and d.status = 'dead' and d.keys && cast(:once as text[])"
    "  and k.key in (select key from applied)"
    "  union all select key, lsn, ordinal, null from applied),"
    " placed as (select lsn, ordinal, id,"
    "  max(id) over (partition by key order by lsn, ordinal) as before from known),"
    " sums as (select before, count(distinct (lsn, ordinal)) as count, max(array[lsn, ordinal]) as last"
    "  from placed where id is null and before is not null group by before)"
    " update tailrace.held d set overtaken_by = d.overtaken_by + sums.count,"
    " overtaken_lsn = sums.last[1], overtaken_ordinal = sums.last[2] from sums where d.id = sums.before"
)
_TOLD = text(
    "with letters as (select id, handler, keys from tailrace.held where id = any(cast(:ids as bigint[]))),"
    " noted as materialized (select id, handler, keys, overtaken_by, overtaken_lsn, overtaken_ordinal"
    "  from tailrace.held where handler in (select handler from letters) and status = 'dead'"
    "  and overtaken_by > 0)"
    " select d.id, sum(l.overtaken_by)::bigint, max(array[l.overtaken_lsn, l.overtaken_ordinal])"
    " from letters d join noted l on l.handler = d.handler and l.id >= d.id"
    "  and (l.id = d.id or l.keys && d.keys) group by d.id"
)
HAND_DOWN: Final = (
    "update tailrace.held e set overtaken_by = e.overtaken_by + d.overtaken_by,"
    " overtaken_lsn = d.overtaken_lsn, overtaken_ordinal = d.overtaken_ordinal"
    " from tailrace.held d where d.id = :id and d.overtaken_by > 0 and not d.redriven"
    " and e.id = (select max(id) from tailrace.held where handler = d.handler and status = 'dead'"
    "  and keys && d.keys and id < d.id)"
)
"""What is noted at a dead letter that goes (`:id`) is kept for those before it."""
_HAND_DOWN = text(HAND_DOWN)


class Applied(NamedTuple):
    """A change that was applied."""

    keys: Sequence[bytes]
    position: Position


async def note(session: AsyncSession, handler: str, changes: Sequence[Applied]) -> None:
    """Note applied changes at the dead letters that they have overtaken, under the locks of their lanes."""
    rows = [(key.decode(), *one.position) for one in changes for key in one.keys]
    if not rows:
        return
    keys, lsns, ordinals = (list(column) for column in zip(*rows, strict=True))
    connection = await session.connection()
    parameters = {"handler": handler, "keys": keys, "lsns": lsns, "ordinals": ordinals}
    await connection.execute(_NOTE, parameters | {"once": list(dict.fromkeys(keys))})


class Newer(TypedDict):
    """Newer changes of a dead letter's keys that were applied since it died."""

    count: int
    position: str | None
    """Of the last of them."""


async def told(connection: AsyncConnection, dead_letters: Sequence[int]) -> dict[int, Newer]:
    """Tell of each how many newer changes were applied since it died, and where the last one stands."""
    found = await connection.execute(_TOLD, {"ids": list(dead_letters)})
    newer = {id_: Newer(count=count, position=str(Position(*last))) for id_, count, last in found}
    return {id_: newer.get(id_, Newer(count=0, position=None)) for id_ in dead_letters}


async def hand_down(connection: AsyncConnection, dead_letter: int) -> None:
    """Keep what is noted at a dead letter that goes."""
    await connection.execute(_HAND_DOWN, {"id": dead_letter})
