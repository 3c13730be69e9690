"""What a pass over a lane is made of: its transaction, what it knows, what it did and how it ended.

Plain data, shared by drain.py (the order of steps) and applying.py (the calls).
"""

import enum
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sqlalchemy.ext.asyncio import AsyncSession

from worker.change import Position
from worker.draining.notes import Notes
from worker.following import Fates
from worker.lanes import Lane, Read
from worker.overtaking import Applied
from worker.positions import LaneRow, SourceRow
from worker.retries import Failure


class Pass(enum.Enum):
    """How a pass over a lane ended."""

    EMPTY = "empty"
    """Nothing above the position."""
    MORE = "more"
    """A full batch was applied; there may be more."""
    BUSY = "busy"
    """Another worker has the row, or another transaction was in the way."""
    SOON = "soon"
    """The next change has committed, but cannot be seen yet by others: a matter of moments."""
    HOLE = "hole"
    """Entries are missing; the listener has been asked to read them again."""
    AWAY = "away"
    """Postgres or Redis is away; `reason` says which."""
    NEWER = "newer"
    """Only a newer version can go on here; `reason` says why."""
    MEETING = "meeting"
    """The next change belongs to several lanes, and another one has not got there yet."""
    UNKNOWN = "unknown"
    """No such lane: the handler is not active, or the number of lanes has changed."""


@dataclass
class Progress:
    """What one transaction did, for those who act after its commit."""

    read: int = 0
    """Changes that the lane has passed."""
    applied: int = 0
    holding: Counter[int] = field(default_factory=Counter)
    """By how much the number of held rows of each lane has changed."""
    parked: Counter[int] = field(default_factory=Counter)
    """By how much the number of parked rows of each lane has changed."""
    last: Read | None = None
    """The entry up to which the lane has moved."""
    others: dict[int, Read] = field(default_factory=dict)
    """Entries up to which other lanes have moved with it."""
    at: Position = Position.ZERO
    """Where the lane stands after the pass."""
    ended: Pass = Pass.EMPTY
    reason: str = ""
    done: list[Applied] = field(default_factory=list)
    """Changes that were applied, of a change handler."""
    retried: bool = False
    """Held changes were tried again."""
    wake: set[int] = field(default_factory=set)
    """Other lanes that can go on now."""
    due_in: float = math.inf
    """Seconds until the first change that failed in it is due again."""
    notes: Notes | None = None
    """Of calls, where the lane is under suspicion."""
    latest_at: float = 0.0
    """When the listener had the newest change applied, in seconds since 1970."""
    retries: int = 0
    """Calls for held changes."""
    failures: Counter[str] = field(default_factory=Counter)
    """Of the handler, by the class of the error."""
    called: int = 0
    """Changes, or keys, in calls for fresh ones that went well at once."""
    called_seconds: float = 0.0
    """That these calls took."""
    fates: Fates | None = None
    """What became of each change, where somebody follows them."""
    arrived: dict[Position, float] = field(default_factory=dict)
    """Where changes are traced: when the listener had those that are fresh, in seconds since 1970."""
    began: int = 0
    """When the pass began and when its commit did, in nanoseconds since 1970."""
    commits: int = 0

    def tell(self, fate: str, positions: Iterable[Position]) -> None:
        """Note what became of changes."""
        if self.fates is not None:
            self.fates += [(position, fate) for position in positions]


@dataclass(frozen=True)
class Turn:
    """The transaction of a pass, and what holds in it."""

    session: AsyncSession
    lane: Lane
    row: LaneRow
    source: SourceRow
    progress: Progress
    careful: bool
    """A call has failed: call with savepoints, to find out whose fault it is."""
    together: bool
    """Calls with several items are tried first; False once such a call has taken the transaction with it."""
    spoilers: dict[object, Failure]
    """What took an earlier transaction of this pass with it: not called again, but held."""
    along: Mapping[int, LaneRow] = field(default_factory=dict)
    """Lanes whose rows are locked for what is parked: its own, and those taken along."""
    notes: Notes | None = None
    """Of a lane over which a worker has died: one call at a time, each noted."""
    shared: bool = False
    """Of several lanes: all of it is applied, or nothing."""

    @property
    def may_overtake(self) -> bool:
        """What is applied may overtake dead letters: some exist, or this pass may have made some."""
        progress = self.progress
        return self.source.has_dead or self.careful or progress.retried or bool(progress.failures)

    def holds(self, lanes: tuple[int, ...], rows: int) -> None:
        """Count held rows of lanes."""
        for number in lanes:
            self.progress.holding[number] += rows
