"""Finds the change whose call ends the worker's process: a crash, out of memory.

Nothing of such a call is ever committed, and it would be repeated for ever. A lane that is taken from a dead
worker is under suspicion: what that worker may have had in hand is applied one by one, each call noted
before it begins. The note lies in Redis, where it is a hint like the claim: lost, it is written again by the
next death. Whoever finds the note of a dead worker counts one more death for that change; after three it is
not called again, but a dead letter. Nothing is noted while nobody dies.
"""

from dataclasses import dataclass

import msgspec

from worker.change import Position
from worker.errors import WorkerDied
from worker.lanes import Lane, Lanes
from worker.retries import Failure, Policy, classify

MOST_DEATHS = 3


class _Note(msgspec.Struct, frozen=True, array_like=True):
    worker: str
    name: str
    """What is called: a position, or `held:<id>`."""
    deaths: int
    """Of workers, before this call."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Note)


@dataclass
class Suspicion:
    """Of one lane."""

    worker: str
    """Who has the lane now."""
    until: Position | None = None
    """End of what the dead worker may have had in hand; None before the first look."""


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

    def deaths(self, name: str) -> int:
        """Count the workers that have died over a call, the one that raised the suspicion included."""
        found = self._found
        if found is None or found.name != name:
            return 1
        # One of our own is of an earlier try of the same pass.
        return found.deaths + (found.worker != self.suspicion.worker)

    def verdict(self, name: str, policy: Policy) -> Failure | None:
        """Tell whether it is not to be called any more."""
        if (deaths := self.deaths(name)) < MOST_DEATHS:
            return None
        return classify(WorkerDied(f"{deaths} workers have died in this call"), 1, policy)

    async def begin(self, name: str) -> None:
        """Note that a call begins."""
        await self._lanes.note(
            self._lane, _ENCODER.encode(_Note(self.suspicion.worker, name, self.deaths(name)))
        )
        self._written = True

    async def end(self) -> None:
        """Forget the note: the call has come back, however it went."""
        if self._written:
            await self._lanes.forget_note(self._lane)
            self._written = False
