"""The averages behind the limits per second, made the way the real server makes them.

Counts are put into buckets of one tick; the average over the window is made when a tick ends and holds
until the next. A burst therefore passes until its tick is over, and then costs a whole window of silence.
Pure.
"""

import time
from collections import deque
from collections.abc import Callable


class RateCounter:
    """Events per second over a window; `limit=None` is never exceeded."""

    def __init__(
        self, limit: float | None, *, tick: float, window: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._tick = tick
        self._clock = clock
        self._ended: deque[int] = deque(maxlen=max(1, round(window / tick)))
        self._current = 0
        self._average = 0.0
        self._tick_ends: float | None = None

    def add(self, amount: int = 1) -> None:
        """Count `amount` events now."""
        if self._limit is not None:
            self._roll()
            self._current += amount

    def exceeded(self) -> bool:
        """Whether the average of the ticks that have ended is at or over the limit."""
        if self._limit is None:
            return False
        self._roll()
        return self._average >= self._limit

    def _roll(self) -> None:
        now = self._clock()
        if self._tick_ends is None:
            self._tick_ends = now + self._tick
        if now < self._tick_ends:
            return
        passed = int((now - self._tick_ends) / self._tick) + 1
        self._ended.append(self._current)
        self._ended.extend([0] * min(passed - 1, self._ended.maxlen or 0))
        self._current = 0
        self._tick_ends += passed * self._tick
        self._average = sum(self._ended) / (len(self._ended) * self._tick)
