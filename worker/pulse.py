"""Whether work gets on: what decides that a process hangs and is to be started again.

A loop that turns proves little: it turns beside a pass that waits for ever. So whoever works says so here,
and says each time that it has got on, or knows for what it waits. What waits for a server, for room or for
work is no reason for a new start; what says nothing for too long is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

STUCK_SECONDS = 60.0


class _Work:
    """Something that is being done."""

    def __init__(self, what: str, seconds: float, now: float) -> None:
        self.what = what
        self.seconds = seconds
        self.at = now


_UNDER_WAY: ContextVar[Callable[[], None] | None] = ContextVar("worker.pulse", default=None)


class Pulse:
    """What is being done in one process.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._works: set[_Work] = set()

    @contextmanager
    def working(self, what: str, seconds: float = STUCK_SECONDS) -> Iterator[None]:
        """Do something that gets on, and says so by `beat()`, at least once in so many seconds.

        Args:
            what: it is, in words for a person.
            seconds: without a beat, after which it counts as stuck.
        """
        work = _Work(what, seconds, self._clock())

        def got_on() -> None:
            work.at = self._clock()

        self._works.add(work)
        before = _UNDER_WAY.set(got_on)
        try:
            yield
        finally:
            _UNDER_WAY.reset(before)
            self._works.discard(work)

    def stuck(self) -> list[str]:
        """Tell what has not got on for too long."""
        now = self._clock()
        return sorted(
            f"{work.what} has not got on for {now - work.at:.0f} s"
            for work in self._works
            if now - work.at > work.seconds
        )


def beat() -> None:
    """Say that the work under way here, if any, has got on, or knows for what it waits."""
    got_on = _UNDER_WAY.get()
    if got_on is not None:
        got_on()


__all__ = ["STUCK_SECONDS", "Pulse", "beat"]
