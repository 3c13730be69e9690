"""The canary: a row written every few seconds that must come back as a change. Pure bookkeeping, no I/O.

It is the only proof that a subscription carries anything: socket, heartbeats and channel can all look well
while Realtime has forgotten the subscription. Changes come in commit order, so a canary that is overtaken
by a later one tells that changes were dropped between them.
"""

from collections import OrderedDict, deque
from datetime import datetime
from typing import NamedTuple


class Written(NamedTuple):
    """When a canary was about to be written, by both clocks."""

    clock: float
    moment: datetime


class Return(NamedTuple):
    """A canary that came back."""

    moment: datetime
    """When it was about to be written: what was committed before has arrived before it."""
    overtook: bool
    """An earlier one has not come back and will not."""


class Canary:
    """Which canaries are out, and when the last one came back."""

    def __init__(self) -> None:
        self._out: OrderedDict[str, Written] = OrderedDict()
        # The frame may be faster than the return of the statement that caused it.
        self._early: deque[tuple[str, float]] = deque(maxlen=64)
        self._last: Written | None = None
        self.write_trouble = ""
        """Why the last canary could not be written, in words; empty when it could."""
        self.lag_seconds: float | None = None
        """How long the last one took, from before it was written to its return; None before the first."""

    @property
    def last(self) -> Written | None:
        """The last canary that came back on this socket."""
        return self._last

    def reset(self) -> None:
        """A new socket: what is out cannot come back, and the past proves nothing."""
        self._out.clear()
        self._early.clear()
        self._last = self.lag_seconds = None

    def written(self, token: str, written: Written) -> Return | None:
        """A canary is committed; return it when it has already come back."""
        self._out[token] = written
        for early in self._early:
            if early[0] == token:
                self._early.remove(early)
                return self.seen(*early)
        return None

    def seen(self, token: str, clock: float) -> Return | None:
        """A canary's change has arrived; None for one that is not (yet) known to be ours."""
        if token not in self._out:
            self._early.append((token, clock))
            return None
        overtook = next(iter(self._out)) != token
        while True:
            name, written = self._out.popitem(last=False)
            if name == token:
                break
        self._last = written
        self.lag_seconds = max(0.0, clock - written.clock)
        return Return(written.moment, overtook)

    def excuse(self) -> None:
        """Something came back that proves the path but does not say which canary it was."""
        if self._out:
            self._last = next(reversed(self._out.values()))
            self._out.clear()

    def waiting(self, now: float, fresh: float) -> float:
        """Return for how many seconds the oldest canary has been out; 0.0 when none is.

        Args:
            now: the clock's present reading.
            fresh: the reading since which frames have been read without a pause; waiting counts from there.
        """
        if not self._out:
            return 0.0
        return max(0.0, now - max(next(iter(self._out.values())).clock, fresh))
