"""What a handler's failure means: whether it counts as an attempt, how long the change waits, what to do.

Pure: no clock, no database. Handlers state verdicts (`RetryLater`, `GiveUp`); everything else is judged by
one table, from the top.
"""

import enum
import random
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, NamedTuple

from worker.database import is_conflict, is_lost, sqlstate_of
from worker.errors import (
    GiveUp,
    HandlerExit,
    HandlerStuck,
    MissingValueError,
    NewerFormat,
    RedisLost,
    RetryLater,
    SessionMisuse,
    WorkerDied,
)

MOST_TEXT = 8_000
"""Characters of an error or traceback that are kept."""

Sort = Literal["integrity", "type"]
"""Of failures that WORKER_GIVE_UP_ON may name."""


class Answer(enum.Enum):
    """What follows from a failure."""

    LANE_WAITS = "nobody is to blame: the whole lane waits, and no attempt is used up"
    LATER = "the handler wants to be called again: no attempt is used up"
    BACKOFF = "an attempt is used up; the change waits, and after the last one it is a dead letter"
    NEVER = "it is a dead letter at once"


class Rule(NamedTuple):
    """One line of the table."""

    meets: Callable[[BaseException], bool]
    answer: Answer
    hint: str
    """For the operator."""
    sort: Sort | None = None
    """Given up at once where the setting names it."""


def _is(*kinds: type[BaseException]) -> Callable[[BaseException], bool]:
    return lambda error: isinstance(error, kinds)


def _state(*classes: str) -> Callable[[BaseException], bool]:
    return lambda error: (sqlstate_of(error) or "").startswith(classes)


RULES: tuple[Rule, ...] = (
    Rule(_is(GiveUp), Answer.NEVER, "The handler gave it up, for the reason it states."),
    Rule(_is(RetryLater), Answer.LATER, "The handler waits for something: its reason says for what."),
    Rule(
        _is(WorkerDied),
        Answer.NEVER,
        "Look into the system's log for what ended the worker (out of memory, a crash of a library); redrive"
        " once it is mended.",
    ),
    Rule(is_lost, Answer.LANE_WAITS, "Postgres went away in the midst: nothing to do but bring it back."),
    Rule(_is(RedisLost), Answer.LANE_WAITS, "Redis went away in the midst: nothing to do but bring it back."),
    Rule(_is(NewerFormat), Answer.LANE_WAITS, "A newer version wrote it: it waits for a worker of that one."),
    Rule(is_conflict, Answer.LANE_WAITS, "Another transaction was in the way: it is tried again at once."),
    Rule(
        _is(SessionMisuse),
        Answer.BACKOFF,
        "Handlers never commit, roll back or close their session: the worker does, with the position.",
    ),
    Rule(
        _is(HandlerExit),
        Answer.BACKOFF,
        "Handlers neither end the process nor cancel themselves: let them return, or raise an exception.",
    ),
    Rule(
        _is(HandlerStuck),
        Answer.BACKOFF,
        "The handler swallows asyncio.CancelledError: it must pass it on, or its `timeout` cannot end it.",
    ),
    Rule(
        _is(MissingValueError),
        Answer.BACKOFF,
        "A value is not to be had any more; the handler should look at `change.missing` before it asks.",
    ),
    Rule(
        _is(TimeoutError),
        Answer.BACKOFF,
        "The call took longer than its `timeout`: find what it waits for, or raise it.",
    ),
    Rule(
        _state("23"),
        Answer.BACKOFF,
        "A constraint of the derived tables refuses it: mend the row it collides with, or the handler.",
        "integrity",
    ),
    Rule(
        _state("22"),
        Answer.BACKOFF,
        "A value does not fit its column: mend the column or the handler.",
        "type",
    ),
    Rule(_is(TypeError), Answer.BACKOFF, "The handler met a value of a type it does not expect.", "type"),
    Rule(
        _state("42"),
        Answer.BACKOFF,
        "The handler's SQL does not fit the database: run its migrations, or grant what it lacks.",
    ),
    Rule(
        _is(OSError),
        Answer.BACKOFF,
        "A call to the outside failed: see whether the other side is up.",
    ),
    Rule(_is(BaseException), Answer.BACKOFF, "The handler raised it: see the traceback."),
)


class Backoff(NamedTuple):
    """How long to wait after an attempt: `base * 2^n` seconds, at most `most`, with full jitter."""

    base: float
    most: float
    draw: Callable[[], float] = random.random

    def delay(self, attempts: int) -> float:
        """Seconds to wait after so many failed attempts."""
        ceiling: float = min(self.most, self.base * 2.0 ** min(attempts - 1, 40))
        return ceiling * self.draw()


class Allowance:
    """So many a second on average: when all that had failed is due at once, it must not come as a storm.

    Args:
        rate: per second.
        clock: gives seconds.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._most = max(1.0, rate)
        self._left = self._most
        self._at = clock()

    def take(self) -> bool:
        """Take one, if there is one left."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    def spend(self) -> None:
        """Count one that could not be foreseen: those that follow wait for it."""
        self._left -= 1.0


class Policy(NamedTuple):
    """How patient to be with one handler."""

    backoff: Backoff
    max_attempts: int
    """The first included."""
    give_up_on: frozenset[Sort] = frozenset()
    halts: bool = False
    """A dead letter holds back its keys until a person has decided."""
    retries_per_second: float = 1000.0
    """Calls, in one worker."""


class Failure(NamedTuple):
    """A failed attempt, as it is kept with the change."""

    error_class: str
    error: str
    traceback: str
    delay: float | None
    """Seconds until the next attempt; None: never, it is a dead letter."""
    hint: str = ""
    counts: bool = True
    """It has used up an attempt."""
    halts: bool = False
    """A dead letter that holds back its keys."""

    @property
    def holds_back(self) -> bool:
        """Later changes of its keys wait."""
        return self.delay is not None or self.halts


def _from_handler(error: BaseException) -> TracebackType | None:
    """Leave out the worker's own calls on the way to the handler, where it got there."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_globals.get("__name__", "").startswith("worker.draining."):
        found = found.tb_next
    return found or error.__traceback__


def _told(error: BaseException) -> Iterator[str]:
    """Format the traceback as Python does, but for the carets: to place them it parses each line anew."""
    told = traceback.TracebackException(type(error), error, _from_handler(error), compact=True)
    ahead: list[traceback.TracebackException | None] = [told]
    for one in ahead:
        if one is not None:
            for frame in one.stack:
                frame.colno = frame.end_colno = None
            ahead += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return told.format()


def blames_nobody(error: BaseException) -> bool:
    """Tell whether the whole lane waits, and no attempt is used up."""
    return _rule(error).answer is Answer.LANE_WAITS


def _rule(error: BaseException) -> Rule:
    return next(rule for rule in RULES if rule.meets(error))


def classify(error: BaseException, attempts: int, policy: Policy) -> Failure | None:
    """Judge the failure of an attempt.

    Args:
        error: what the handler, or the database on its behalf, raised.
        attempts: how many attempts have failed, this one included.
        policy: how patient to be.

    Returns:
        The failure to keep; None where nobody is to blame: the whole lane waits.
    """
    rule = _rule(error)
    if rule.answer is Answer.LANE_WAITS:
        return None
    delay: float | None = policy.backoff.delay(max(1, attempts))
    if rule.answer is Answer.LATER:
        delay = delay if getattr(error, "seconds", None) is None else error.seconds  # type: ignore[attr-defined] # of RetryLater
    elif rule.answer is Answer.NEVER or rule.sort in policy.give_up_on or attempts >= policy.max_attempts:
        delay = None
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    text = "".join(_told(error))
    counts, halts = rule.answer is not Answer.LATER, policy.halts and delay is None
    return Failure(name, str(error)[:MOST_TEXT], text[-MOST_TEXT:], delay, rule.hint, counts, halts)
