"""Where a reading of the log begins: the slot found, judged, or made. Writes nothing down; see proven.py."""

from typing import Final, NamedTuple

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.database import is_away, is_conflict, sqlstate_of
from worker.reading import reached, record
from worker.reading.ground import Ground
from worker.source import RereadError
from worker.wal.slot import (
    Judgement,
    Server,
    as_text,
    create_slot,
    drop_slot,
    judge,
    read_server,
    read_slot,
    terminate_holder,
)

log = structlog.get_logger(__name__)

_MENDABLE: Final = {
    "42501": "the database's user may not do it",
    "42710": "somebody else has just made one of that name",
    "53400": "all replication slots are taken: drop an unused one or raise max_replication_slots",
    "55000": "wal_level must be logical",
    "55006": "another session reads from it",
    "55P03": "a lock could not be had in time",
    "57014": "the statement was cancelled",
}
"""What a person or time can mend: no fault of the program."""


class Foothold(NamedTuple):
    """Where reading begins."""

    start: int
    """LSN from which on commits are read."""
    server: Server
    judgement: Judgement
    """Whether anything is missing before that."""
    remembered: record.Remembered


async def find(ground: Ground) -> Foothold:
    """Free the slot of whoever reads from it, judge it, make it where there is none.

    Raises:
        RereadError: not now.
    """
    name = ground.settings.slot
    async with ground.engine.connect() as connection:
        await terminate_holder(connection, name)
        await connection.rollback()
        remembered = await record.read(connection)
        await connection.rollback()
        return await _find(ground, connection, remembered)


async def _find(ground: Ground, connection: AsyncConnection, remembered: record.Remembered) -> Foothold:
    name = ground.settings.slot
    slot, server = await read_slot(connection, name), await read_server(connection)
    await connection.rollback()
    read_before = await ground.in_redis(lambda: reached.read(ground.lanes, server.system_identifier))
    judgement = judge(slot, server, remembered.slot, reached=read_before)
    if judgement.finding == "foreign":
        raise RereadError(judgement.reason, seconds=5.0)
    if judgement.finding == "lost":
        await drop_slot(connection, name)
    if slot is None or judgement.finding == "lost":
        start = await create_slot(connection, name)
        log.info("slot made", slot=name, lsn=as_text(start))
        if remembered.slot is None:
            judgement = Judgement("fine", "")  # the very first start: handlers begin at the present
        return Foothold(start, await read_server(connection), judgement, remembered)
    return Foothold(slot.confirmed, server, judgement, remembered)


def to_wait_for(error: DBAPIError) -> RereadError | None:
    """Give what to wait with where time or a person can mend an error at the start of a reading."""
    if is_away(error):
        return None
    if is_conflict(error):
        return RereadError("another transaction was in the way at the start of a reading", seconds=0.5)
    why = _MENDABLE.get(sqlstate_of(error) or "")
    return None if why is None else RereadError(f"reading of the log cannot begin: {why}", seconds=5.0)
