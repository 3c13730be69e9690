"""Within a pass: parks what stands in a lane.

A lane that lags or is paused must not fill Redis and hold up the others. Its changes move to Postgres in the
transaction that moves its position; see worker/parked.py for how they wait there, and unparking.py for how
they are applied.
"""

from collections.abc import Sequence

import structlog

from worker import parked
from worker.draining.applying import count
from worker.draining.passes import Turn
from worker.held import Kept
from worker.lanes import Read

log = structlog.get_logger(__name__)

AT_ONCE = 1_000
"""Entries parked in one transaction."""


async def park(turn: Turn, batch: Sequence[Read], *, derives: bool) -> None:
    """Move entries of the lane, and of the lanes taken along with it, to Postgres.

    Args:
        turn: holds the rows of their lanes.
        batch: in the order of positions.
        derives: the handler computes from keys; of those one row each is kept.
    """
    lane, session = turn.lane, turn.session
    if turn.row.parked == 0:
        reason = "paused" if turn.source.paused else "too far behind"
        log.warning("lane is parked in Postgres", handler=lane.handler, lane=lane.number, reason=reason)
    turn.progress.tell("parked", (read.position for read in batch))
    if derives:
        counts, _ = count(batch, set())
        rows = await parked.park_keys(session, lane, counts, batch[-1].position)
        turn.progress.parked[lane.number] += rows
        turn.holds((lane.number,), rows)
        return
    changes = [
        Kept(read.entry.lanes, read.entry.keys, read.position, read.entry.source, read.entry.payload)
        for read in batch
    ]
    await parked.park(session, lane.handler, changes)
    for kept in changes:
        turn.progress.parked[kept.lanes[0]] += 1
        turn.holds(kept.lanes, 1)
