"""A TRUNCATE in the lanes of a derive handler: it names no keys, so each lane finds out its own.

Every lane has an entry without keys. Under its lock a lane asks the handler for all the keys that it keeps,
and takes those that are its own: it never computes another lane's key.
"""

from collections.abc import Sequence
from contextlib import aclosing
from datetime import UTC, datetime

import structlog
from msgspec.structs import replace

from worker import gaps
from worker.draining.items import Decoder
from worker.draining.passes import Turn
from worker.kept_keys import KeyColumn, kept_keys
from worker.lanes import Read
from worker.registry import Handler
from worker.routing import lane_of
from worker.source import Gap
from worker.values.database import is_data_error

log = structlog.get_logger(__name__)


async def with_kept_keys(
    turn: Turn, handler: Handler, decoder: Decoder, batch: Sequence[Read]
) -> Sequence[Read]:
    """Give each entry that has no keys all that the handler keeps in this lane."""
    if handler.kind != "derive" or all(read.entry.keys for read in batch):
        return batch
    keys = await _keys_of(turn, handler, decoder)
    completed = []
    for read in batch:
        if read.entry.keys:
            completed.append(read)
            continue
        if not keys:
            turn.progress.applied += read.entry.changes  # there is nothing to compute
        completed.append(Read(read.position, replace(read.entry, keys=keys)))
    return completed


async def _keys_of(turn: Turn, handler: Handler, decoder: Decoder) -> tuple[bytes, ...]:
    """Read the lane's keys; where that cannot be done, a gap is recorded in the transaction of the pass."""
    if handler.all_keys is None:  # it had them when the TRUNCATE was routed
        await _record_gap(turn, handler)
        return ()
    lanes = turn.source.lanes or 1
    columns = [KeyColumn.of(name, "text") for name in decoder.key_types()]
    own: dict[bytes, None] = {}
    # What it sets for the reading is undone with it: the handler's session has settings of its own.
    reading = await turn.session.begin_nested()
    try:
        async with aclosing(kept_keys(await turn.session.connection(), handler, columns)) as pages:
            async for page in pages:
                numbers = [lane_of(handler.name, key, lanes) for key in page]
                mine = (key for key, number in zip(page, numbers, strict=True) if number == turn.lane.number)
                own |= dict.fromkeys(mine)
    except Exception as error:
        if not is_data_error(error):
            raise
        await reading.rollback()
        await _record_gap(turn, handler)
        return ()
    await reading.rollback()
    return tuple(own)


async def _record_gap(turn: Turn, handler: Handler) -> None:
    cause = f"the keys that {handler.name} keeps could not be read for a TRUNCATE"
    tables = tuple(sorted({(one.schema, one.table) for one in handler.subscriptions}))
    connection = await turn.session.connection()
    if await gaps.widen(connection, Gap(None, datetime.now(UTC), cause, tables)):
        log.error("gap", handler=handler.name, lane=turn.lane.number, cause=cause)
