"""Rounds in which contenders take turns, so that a noisy minute hits all of them.

It knows nothing of what is measured. A contender that fails is named in the report and is out; the others go
on.
"""

import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from redis.exceptions import RedisError

from benchmarks.report import Report
from examples.demo.database import GONE
from examples.demo.processes import DemoError

FAILURES: Final = (DemoError, TimeoutError, RedisError, *GONE)
"""What a case may raise that ends it, but not the run."""


@dataclass
class Contender:
    """One case that is measured once in each round.

    Attributes:
        case: its name in the report.
        measure: does one round, and returns its figure.
        floor: case to which the report gives its ratio.
        seconds: within which a round must end.
        rounds: what the rounds have given.
    """

    case: str
    measure: Callable[[], Awaitable[float]]
    floor: str | None = None
    seconds: float = 120.0
    rounds: list[float] = field(default_factory=list)


async def interleave(
    report: Report,
    contenders: Sequence[Contender],
    rounds: int,
    unit: str,
    *,
    until: float = math.inf,
) -> None:
    """Run the rounds, and add the figures to the report.

    Args:
        report: gets the figures.
        contenders: in the order in which they take turns.
        rounds: how many, unless the time is over before.
        unit: of the figures.
        until: when no further round is begun, by the monotonic clock; the first always is.
    """
    try:
        await _take_turns(report, list(contenders), rounds, unit, until)
    finally:  # what was measured counts, also where the time is over in the middle of a round
        for one in contenders:
            if one.rounds:
                floor = report.found(one.floor) if one.floor is not None else None
                report.add(one.case, unit, one.rounds, floor=floor)


async def _take_turns(
    report: Report, standing: list[Contender], rounds: int, unit: str, until: float
) -> None:
    for number in range(rounds):
        if number and standing and time.monotonic() > until:
            report.note(f"{number} of {rounds} rounds, as time was over: {standing[0].case} and others")
            break
        for one in list(standing):
            try:
                async with asyncio.timeout(one.seconds):
                    one.rounds.append(await one.measure())
            except FAILURES as error:
                explained = _explained(error, one.seconds)
                report.fail(one.case, explained)
                standing.remove(one)
                tell(f"{one.case}: failed: {explained}")
                continue
            tell(f"round {number + 1} of {rounds}: {one.case}: {one.rounds[-1]:,.1f} {unit}")


def tell(text: str) -> None:
    """Say how far the run is; the figures themselves go to standard output at its end."""
    print(text, file=sys.stderr, flush=True)


def _explained(error: BaseException, seconds: float) -> BaseException:
    return DemoError(f"not done after {seconds:g} s") if isinstance(error, TimeoutError) else error
