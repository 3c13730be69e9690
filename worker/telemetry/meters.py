"""What a worker counts, once for each pass and never for each change: plain numbers until somebody asks.

They begin at nought with the process. What must add up stands in Postgres, not here.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from worker.telemetry.names import Histogram, Sample

CHANGES: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000)
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LAGS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 3_600.0)
MOST_CLASSES: Final = 50
"""Error classes of one handler that are told apart: one that makes up classes must not fill Prometheus."""
OTHER: Final = "other"


class Observed:
    """Observations of one thing, by size."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> Histogram:
        """Tell them, each bound with all that is below it."""
        buckets, below = [], 0
        names = [*(f"{bound:.12g}" for bound in self._bounds), "+Inf"]
        for name, count in zip(names, self._counts, strict=True):
            below += count
            buckets.append((name, below))
        return Histogram(tuple(buckets), self._sum)


class _OfHandler:
    def __init__(self) -> None:
        self.changes = Observed(CHANGES)
        self.seconds = Observed(SECONDS)
        self.lag = Observed(LAGS)
        self.applied = self.retries = 0
        self.failures: Counter[str] = Counter()


class Meters:
    """What the passes of one worker did, by handler.

    Args:
        handlers: names of all there are: what has not happened yet is told as nought.
    """

    def __init__(self, handlers: Iterable[str]) -> None:
        self._handlers = {name: _OfHandler() for name in handlers}

    def passed(self, handler: str, changes: int, seconds: float, lag: float | None) -> None:
        """Count a pass that has moved something.

        Args:
            handler: its name.
            changes: that the pass has taken.
            seconds: that it took.
            lag: of its newest change, in seconds; None where there was none.
        """
        own = self._handlers[handler]
        own.changes.add(changes)
        own.seconds.add(seconds)
        if lag is not None:
            own.lag.add(lag)

    def outcome(self, handler: str, applied: int, retries: int, failures: Mapping[str, int]) -> None:
        """Count what has come of changes: failures by their class."""
        own = self._handlers[handler]
        own.applied += applied
        own.retries += retries
        for name, count in failures.items():
            known = name in own.failures or len(own.failures) < MOST_CLASSES
            own.failures[name if known else OTHER] += count

    def samples(self) -> Iterator[Sample]:
        """Tell all of it."""
        for name, own in self._handlers.items():
            yield Sample("tailrace_pass_changes", own.changes.told(), (name,))
            yield Sample("tailrace_pass_duration_seconds", own.seconds.told(), (name,))
            yield Sample("tailrace_pass_lag_seconds", own.lag.told(), (name,))
            yield Sample("tailrace_worker_applied_total", own.applied, (name,))
            yield Sample("tailrace_worker_retries_total", own.retries, (name,))
            for error_class, count in own.failures.items():
                yield Sample("tailrace_worker_failures_total", count, (name, error_class))
