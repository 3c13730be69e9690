"""What Postgres remembers of the slot and of the server it belongs to, in the row of the source.

Written before the slot is moved, and read at every start: a slot that stands beyond what is recorded was
moved by somebody else.
"""

from typing import NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.change import Position
from worker.lanes import LeaseLostError
from worker.lease import limited
from worker.paging import rewind
from worker.wal.publication import Fingerprint
from worker.wal.slot import Recorded, Server

_READ = text(
    "select slot_target, system, timeline, published, delivery, generation, noted_lsn, noted_ordinal"
    " from tailrace.source"
)
_BEGIN = text(
    "update tailrace.source set delivery = 'proven', slot_target = :target, system = :system,"
    " timeline = :timeline, server_started = cast(cast(:started as text) as timestamptz),"
    " published = cast(:published as jsonb), reread = null where lease_token = :token returning id"
)
_TARGET = limited(
    "update tailrace.source set slot_target = greatest(slot_target, :target)"
    " where lease_token = :token returning"
)
_PUBLISHED = limited(
    "update tailrace.source set published = cast(:published as jsonb) where lease_token = :token returning"
)
_FORWARD = text(
    "update tailrace.lanes set lsn = case when :anew or lsn < :lsn then :lsn else lsn end,"
    " ordinal = case when :anew or lsn < :lsn then -1 else ordinal end,"
    " arrived_lsn = null, arrived_ordinal = null"
)
_NOTED = text("update tailrace.source set noted_lsn = :lsn, noted_ordinal = -1")
_FORGET = text(
    "update tailrace.source set delivery = 'plain', generation = null, slot_target = null, published = null"
)
_HISTORY = text("update tailrace.source set history = replace(gen_random_uuid()::text, '-', '')")


class Remembered(NamedTuple):
    """What was recorded."""

    slot: Recorded | None
    published: Fingerprint | None
    delivery: str
    generation: str | None
    noted: Position
    """Up to here what has no entry in any lane is written down."""


def another_history(remembered: Remembered, server: Server) -> bool:
    """Tell whether this is another history; a restored database has mostly lost its slot as well."""
    known = remembered.slot
    return known is not None and (known.system_identifier, known.timeline) != (
        server.system_identifier,
        server.timeline,
    )


def another_cluster(remembered: Remembered, server: Server) -> bool:
    """Tell whether positions of before are those of another log."""
    return remembered.slot is not None and remembered.slot.system_identifier != server.system_identifier


def first_target(remembered: Remembered, start: int) -> int:
    """Give what to record: a move that was under way when reading ended may come to pass only now."""
    return start if remembered.slot is None else max(start, remembered.slot.target)


async def read(connection: AsyncConnection) -> Remembered:
    """Read what was recorded; the slot is None where there has been none yet."""
    row = (await connection.execute(_READ)).one()
    recorded = None if row[0] is None else Recorded(row[0], row[1], row[2])
    published = None if row[3] is None else msgspec.convert(row[3], Fingerprint)
    return Remembered(recorded, published, row[4], row[5], Position(row[6], row[7]))


async def begin(
    connection: AsyncConnection, token: str, target: int, server: Server, published: Fingerprint | None
) -> None:
    """Record what a generation begins with.

    Raises:
        LeaseLostError: somebody else has the lease.
    """
    document = None if published is None else msgspec.json.encode(published).decode()
    parameters = {
        "token": token,
        "target": target,
        "system": server.system_identifier,
        "timeline": server.timeline,
        "started": server.started_at,
        "published": document,
    }
    if (await connection.execute(_BEGIN, parameters)).one_or_none() is None:
        raise LeaseLostError("another listener has taken over")


async def set_target(engine: AsyncEngine, token: str, target: int) -> None:
    """Record up to where the slot is about to be moved.

    Raises:
        LeaseLostError: somebody else has the lease.
    """
    async with engine.begin() as connection:
        found = await connection.execute(_TARGET, {"token": token, "target": target})
        if found.one_or_none() is None:
            raise LeaseLostError("another listener has taken over")


async def set_published(connection: AsyncConnection, token: str, published: Fingerprint | None) -> None:
    """Record which tables the publication has."""
    document = None if published is None else msgspec.json.encode(published).decode()
    await connection.execute(_PUBLISHED, {"token": token, "published": document})


async def restart_at(connection: AsyncConnection, lsn: int, *, anew: bool = False, new_history: bool) -> None:
    """Put every lane where the slot is, waiting for those being drained: what was before is a gap.

    Args:
        connection: commits it.
        lsn: of the slot.
        anew: positions from before say nothing of this log. Otherwise a lane that is further stays there:
            it would apply again what it has applied.
        new_history: whatever has the history's name in it must differ from now on.
    """
    await connection.execute(_FORWARD, {"lsn": lsn, "anew": anew})
    await connection.execute(_NOTED, {"lsn": lsn})
    await rewind(connection)
    if new_history:
        await connection.execute(_HISTORY)


async def forget(connection: AsyncConnection) -> None:
    """Go back to plain delivery: positions begin anew."""
    await connection.execute(_FORGET)
    await restart_at(connection, 0, anew=True, new_history=True)


__all__ = ["Remembered", "begin", "read", "restart_at", "set_published", "set_target"]
