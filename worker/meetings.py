"""Changes that belong to several lanes of a handler: a lane key that changed its value.

Applied by one lane alone, such a change could overtake older changes of its other key. So it stands in every
lane concerned, under the same id. A lane that reaches it notes its arrival and stops; the lowest lane, once
all have arrived, applies it in a transaction that holds all their rows and moves them all. Nobody waits for a
greater id, so no circle can form. Derive handlers need no meeting: each lane computes its own keys.
"""

from sqlalchemy.ext.asyncio import AsyncSession

from worker import positions
from worker.lanes import Lane, Read
from worker.positions import LaneRow


def other_lanes(read: Read, lane: Lane) -> set[int]:
    """List the lanes of a change besides this one."""
    return set(read.entry.lanes) - {lane.number}


class Meeting:
    """One change of several lanes, reached by one of them under its lock."""

    def __init__(self, session: AsyncSession, lane: Lane, row: LaneRow, read: Read) -> None:
        self.session = session
        self.lane = lane
        self.read = read
        self.others = other_lanes(read, lane)
        self._row = row

    async def all_arrived(self) -> bool:
        """Take the other rows and see whether their lanes are here; else note that this one is.

        True only in the lowest lane: the others leave the change to it.

        Raises:
            sqlalchemy.exc.DBAPIError: with SQLSTATE 55P03 where another lane is being drained just now.
        """
        at = self.read.position
        if self._row.arrived != at:
            await positions.arrive(self.session, self.lane, at)
        if self.lane.number != min(self.read.entry.lanes):
            return False
        rows = await positions.lock_others(self.session, self.lane.handler, sorted(self.others))
        return len(rows) == len(self.others) and all(row.arrived == at for row in rows.values())
