"""Whether lanes of a handler that have news at the same time gain by a transaction together.

What is shared is what a pass costs besides its calls. What is lost is that the calls of these lanes come one
after the other: a handler that waits for an answer from outside is better off with a transaction a lane.
"""

import time

from worker.draining.passes import Progress

WEIGHT = 0.1
"""Of the newest pass in what is known of those before."""
APART_SECONDS = 1.0
"""After a transaction over several lanes has failed: what fails comes in crowds."""


class Worth:
    """What is known of one handler's passes."""

    def __init__(self) -> None:
        self._call_seconds = 0.0
        """For one change, or key."""
        self._other_seconds = 0.0
        """What a pass takes besides its calls."""
        self._apart_until = 0.0

    def learn(self, progress: Progress, seconds: float) -> None:
        """Learn from a pass, and how long it took."""
        if not progress.called:
            return
        weight = WEIGHT if self._other_seconds else 1.0
        self._call_seconds += (progress.called_seconds / progress.called - self._call_seconds) * weight
        self._other_seconds += (seconds - progress.called_seconds - self._other_seconds) * weight

    def keep_apart(self) -> None:
        """Note that a transaction over several lanes has failed."""
        self._apart_until = time.monotonic() + APART_SECONDS

    @property
    def shares(self) -> bool:
        """One more change costs less than one more pass would."""
        return self._call_seconds < self._other_seconds and time.monotonic() >= self._apart_until
