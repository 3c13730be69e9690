"""Finds the change whose call ends the worker's process: a crash, out of memory.

Nothing of such a call is ever committed, and it would be repeated for ever. A lane that is taken from a dead
worker is under suspicion: what that worker may have had in hand is applied a few at a time, each call noted
before it begins. Where another worker dies over the few, they are called one by one; the one over which a
third dies is not called again, but a dead letter. The note lies in Redis, where it is a hint like the claim:
lost, it is written again by the next death. Nothing is noted while nobody dies.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from worker.change import Position
from worker.errors import WorkerDied
from worker.lanes import Lane, Lanes
from worker.retries import Failure, Policy, classify

MOST_DEATHS = 3
FEW = 25
"""Entries of one call after the first death: most workers die for other reasons, which must cost little."""
_ROW = "held:"


class _Note(msgspec.Struct, frozen=True, array_like=True):
    worker: str
    first: str
    """What is called: the position of an entry, or `held:<id>` of a row that is parked or held."""
    last: str
    """The last of the call."""
    deaths: int
    """Of workers over it, before this call."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Note)


PlaceT = TypeVar("PlaceT", Position, int)


@dataclass
class Hand(Generic[PlaceT]):
    """What a dead worker may have had in hand: entries by position, or rows by id."""

    until: PlaceT | None = None
    """Its end; None before the first look."""
    deaths: int = 1
    """Over what lies between `since` and `narrowed`."""
    since: PlaceT | None = None
    narrowed: PlaceT | None = None

    def narrow(self, first: PlaceT, last: PlaceT, deaths: int) -> None:
        """Note that workers have died over this part."""
        self.since, self.narrowed, self.deaths = first, last, deaths

    def deaths_over(self, at: PlaceT) -> int:
        """Count them for one of these; at least the first."""
        if self.since is None or self.narrowed is None:
            return 1
        return self.deaths if self.since <= at <= self.narrowed else 1


@dataclass
class Suspicion:
    """Of one lane."""

    worker: str
    """Who has the lane now."""
    alone: asyncio.Lock
    """Of this worker: what is in hand in another lane when it dies must not be accused."""
    entries: Hand[Position] = field(default_factory=Hand[Position])
    rows: Hand[int] = field(default_factory=Hand[int])
    """Of what is parked."""


class Notes:
    """The note of one lane under suspicion, during one pass."""

    def __init__(self, lanes: Lanes, lane: Lane, suspicion: Suspicion, found: bytes | None) -> None:
        self._lanes = lanes
        self._lane = lane
        self.suspicion = suspicion
        self._found = None if found is None else _DECODER.decode(found)
        self._written = found is not None  # also what the dead worker wrote

    @classmethod
    async def open(cls, lanes: Lanes, lane: Lane, suspicion: Suspicion) -> "Notes":
        """Read what the dead worker has left."""
        return cls(lanes, lane, suspicion, await lanes.noted(lane))

    # Entries

    def deaths(self, at: Position) -> int:
        """Count the workers that have died over the entry, as far as is known; at least the first."""
        found, hand = self._found, self.suspicion.entries
        if found is not None and not found.first.startswith(_ROW):
            first, last = Position.parse(found.first), Position.parse(found.last)
            if first <= at <= last:
                hand.narrow(first, last, self._of_found(found))
        return hand.deaths_over(at)

    def few(self, at: Position) -> int:
        """Tell how many entries to take at once, from this one on."""
        return FEW if self.deaths(at) <= 1 else 1

    async def begin(self, first: Position, last: Position) -> None:
        """Note that a call with these entries begins."""
        await self._write(str(first), str(last), self.deaths(first))

    # Rows: what is parked, a few at a time, and held changes, which are called one by one anyway

    def deaths_of_row(self, id_: int) -> int:
        """Count the workers that have died over a row; at least the first."""
        found, hand = self._found, self.suspicion.rows
        if found is not None and found.first.startswith(_ROW):
            first, last = _id(found.first), _id(found.last)
            if first <= id_ <= last:
                hand.narrow(first, last, self._of_found(found))
        return hand.deaths_over(id_)

    def few_rows(self, id_: int) -> int:
        """Tell how many parked rows to take at once, from this one on."""
        return FEW if self.deaths_of_row(id_) <= 1 else 1

    async def begin_rows(self, first: int, last: int) -> None:
        """Note that a call with these rows begins."""
        await self._write(f"{_ROW}{first}", f"{_ROW}{last}", self.deaths_of_row(first))

    # Both

    def _of_found(self, found: _Note) -> int:
        # One of our own is of an earlier try of the same pass.
        return found.deaths + (found.worker != self.suspicion.worker)

    async def _write(self, first: str, last: str, deaths: int) -> None:
        await self._lanes.note(self._lane, _ENCODER.encode(_Note(self.suspicion.worker, first, last, deaths)))
        self._written = True

    async def end(self) -> None:
        """Forget the note: the call has come back, however it went."""
        if self._written:
            await self._lanes.forget_note(self._lane)
            self._written = False


def _id(row: str) -> int:
    return int(row.removeprefix(_ROW))


def verdict(deaths: int, policy: Policy) -> Failure | None:
    """Judge what workers have died over; None where it is to be called once more."""
    if deaths < MOST_DEATHS:
        return None
    return classify(WorkerDied(f"{deaths} workers have died in this call"), 1, policy)
