"""What a handler's failure means: whether it counts as an attempt, and how long the change waits.

Pure: no clock, no database. Handlers state verdicts (`RetryLater`, `GiveUp`), everything else is classified
here.
"""

import random
import traceback
from collections.abc import Callable
from typing import NamedTuple

from worker.database import is_conflict, is_lost
from worker.errors import GiveUp, RetryLater

MOST_TEXT = 8_000
"""Characters of an error or traceback that are kept."""


class Backoff(NamedTuple):
    """How long to wait after an attempt: `base * 2^n` seconds, at most `most`, with full jitter."""

    base: float
    most: float
    draw: Callable[[], float] = random.random

    def delay(self, attempts: int) -> float:
        """Seconds to wait after so many failed attempts."""
        ceiling: float = min(self.most, self.base * 2.0 ** min(attempts - 1, 40))
        return ceiling * self.draw()


class Failure(NamedTuple):
    """A failed attempt, as it is kept with the change."""

    error_class: str
    error: str
    traceback: str
    delay: float | None
    """Seconds until the next attempt; None: never, it is a dead letter."""


def classify(error: BaseException, attempts: int, backoff: Backoff) -> Failure | None:
    """Judge the failure of an attempt.

    Args:
        error: what the handler, or the database on its behalf, raised.
        attempts: how many attempts have failed, this one included.
        backoff: how long to wait.

    Returns:
        The failure to keep; None where nobody is to blame (the database was away, or another transaction was
        in the way): the whole lane waits, and no attempt is used up.
    """
    if is_lost(error) or is_conflict(error):
        return None
    delay: float | None = backoff.delay(attempts)
    if isinstance(error, GiveUp):
        delay = None
    elif isinstance(error, RetryLater) and error.seconds is not None:
        delay = error.seconds
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = "".join(traceback.format_exception(error))
    return Failure(name, str(error)[:MOST_TEXT], text[-MOST_TEXT:], delay)
