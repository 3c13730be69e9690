"""Changes that belong to several lanes of a handler: a lane key that changed its value.

Applied by one lane alone, such a change could overtake older changes of its other key. So it stands in every
lane concerned, under the same id. A lane that reaches it notes its arrival and stops; the lowest lane, once
all have arrived, applies it in a transaction that holds all their rows and moves them all. Nobody waits for a
greater id, so no circle can form. Derive handlers need no meeting: each lane computes its own keys.
"""

import enum
from collections.abc import Collection

from worker import positions
from worker.change import Position
from worker.draining.passes import Turn
from worker.lanes import Lane, Read
from worker.positions import LaneRow


class Meeting(enum.Enum):
    """How things stand with a change of several lanes."""

    WAITING = "waiting"
    """Another lane is to come, or to apply it."""
    READY = "ready"
    """All have arrived and are locked: this lane applies it."""
    MISSED = "missed"
    """Another lane has passed it, through a hole that is recorded as a gap: too late to apply it in order."""


def other_lanes(read: Read, lane: Lane) -> list[int]:
    """List the lanes of a change besides this one, in order."""
    return sorted(set(read.entry.lanes) - {lane.number})


def judge(at: Position, others: int, rows: Collection[LaneRow]) -> Meeting:
    """Judge by the rows of the other lanes how things stand with a change. Pure.

    Args:
        at: where the change stands.
        others: how many other lanes it has.
        rows: of those that are locked here.
    """
    if any(row.position >= at for row in rows):
        return Meeting.MISSED
    if len(rows) == others and all(row.arrived == at for row in rows):
        return Meeting.READY
    return Meeting.WAITING


async def meet(turn: Turn, read: Read) -> Meeting:
    """Note the lane's arrival at a change, and see whether it can be applied.

    The others are woken once, by the arrival: lanes that woke each other while they wait for a third one
    would never rest.
    """
    at, lane, session = read.position, turn.lane, turn.session
    others = other_lanes(read, lane)
    if not others:
        return Meeting.READY
    if turn.row.arrived != at:
        await positions.arrive(session, lane, at)
        turn.progress.wake.update(others)
    # Positions only grow, and nobody moves past the change properly without the row that is locked here.
    rows = await positions.look(session, lane.handler, others)
    if any(row.position >= at for row in rows.values()):
        return Meeting.MISSED
    if lane.number > others[0]:
        return Meeting.WAITING
    rows = await positions.lock_others(session, lane.handler, others)
    return judge(at, len(others), rows.values())
