"""Payloads that Redis is spared: kept in Postgres until their lanes have passed them.

A change may be larger than Redis takes, now or ever. Its entry stands in its lanes all the same, in its place
and in order, and tells how many bytes are here instead. Nothing here is evidence that a change was handled: a
payload goes because the positions of its lanes say so, or because another generation has begun.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker.change import Position
from worker.lanes import MOST_BYTES, Read

_PUT = text(
    "insert into tailrace.payloads (generation, handler, lanes, lsn, ordinal, payload)"
    " values (:generation, :handler, :lanes, :lsn, :ordinal, :payload) on conflict do nothing"
)
_GET = text(
    "select p.lsn, p.ordinal, p.payload"
    " from unnest(cast(:lsns as bigint[]), cast(:ordinals as bigint[])) wanted (lsn, ordinal)"
    " join tailrace.payloads p on p.generation = :generation and p.handler = :handler"
    " and p.lsn = wanted.lsn and p.ordinal = wanted.ordinal"
)
# Only under the lease: one that was replaced does not know which generation is in force.
_SWEEP = text(
    "delete from tailrace.payloads p using tailrace.source s where s.lease_token = :token"
    " and (p.generation is distinct from s.generation or not exists ("
    "  select from tailrace.lanes l join tailrace.handlers h on h.name = l.handler"
    "  where l.handler = p.handler and l.lane = any (p.lanes) and h.state = 'active'"
    "  and (l.lsn, l.ordinal) < (p.lsn, p.ordinal)))"
)
_STORED = text("select handler, lsn, ordinal from tailrace.payloads where generation = :generation")
_ANY = text("select exists (select from tailrace.payloads)")


class Stored(NamedTuple):
    """A payload, and the entries whose it is."""

    handler: str
    lanes: tuple[int, ...]
    position: Position
    payload: bytes


async def put(engine: AsyncEngine, generation: str, payloads: Sequence[Stored]) -> None:
    """Keep payloads, before their entries are written; those that are here already stay."""
    async with engine.begin() as connection:
        for one in payloads:
            await connection.execute(_PUT, {"generation": generation} | _row(one))


def _row(one: Stored) -> dict[str, Any]:
    return {
        "handler": one.handler,
        "lanes": list(one.lanes),
        "lsn": one.position.lsn,
        "ordinal": one.position.ordinal,
        "payload": one.payload,
    }


def fitting(reads: Sequence[Read]) -> Sequence[Read]:
    """Cut entries off before their payloads from here become more than a pass should have in memory."""
    size = 0
    for n, read in enumerate(reads):
        size += read.entry.stored
        if n and size > MOST_BYTES:
            return reads[:n]
    return reads


async def fetch(
    session: AsyncSession, generation: str, handler: str, reads: Iterable[Read]
) -> dict[Position, Read]:
    """Give entries their payloads; one whose payload is not here is left out.

    Args:
        session: holds the row of a lane that has not passed them: until it has, they stay.
        generation: of the entries.
        handler: whose lanes.
        reads: entries that have their payload here.
    """
    by_position = {read.position: read for read in reads}
    connection = await session.connection()
    parameters = {
        "generation": generation,
        "handler": handler,
        "lsns": [position.lsn for position in by_position],
        "ordinals": [position.ordinal for position in by_position],
    }
    found: dict[Position, Read] = {}
    for lsn, ordinal, payload in await connection.execute(_GET, parameters):
        position, entry = by_position[Position(lsn, ordinal)]
        found[position] = Read(position, msgspec.structs.replace(entry, payload=payload))
    return found


async def stored(connection: AsyncConnection, generation: str) -> set[tuple[str, Position]]:
    """List the payloads that are here for a generation: by handler and position."""
    found = await connection.execute(_STORED, {"generation": generation})
    return {(row[0], Position(row[1], row[2])) for row in found}


async def sweep(connection: AsyncConnection, token: str) -> bool:
    """Forget what all of its lanes have passed, and other generations; tell whether any is left."""
    await connection.execute(_SWEEP, {"token": token})
    return bool((await connection.execute(_ANY)).scalar_one())
