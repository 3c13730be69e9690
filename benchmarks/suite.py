"""All benchmarks in one run of less than 20 minutes, whatever becomes of any of them.

Each has a share of the time: after it, no further round is begun; long after it, the benchmark is given up,
and the next one begins. What failed is named in the report, with what it failed of.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from benchmarks import catch_up, drain, end_to_end, idle, latency, scale
from benchmarks.contenders import tell
from benchmarks.pipelines import Kind
from benchmarks.report import Report
from examples.demo.processes import DemoError

TITLE = "all of them but `poison`, `big` and `backfill`, in less than 20 minutes"
NAMES: Final = ("drain", "latency", "catch-up", "end-to-end", "idle", "scale")
LONGEST_SECONDS: Final = 19 * 60.0
"""Of the whole run, what it takes to end the processes of the last benchmark not counted."""
_SECONDS: Final = {
    "drain": 220.0,
    "latency": 200.0,
    "catch-up": 170.0,
    "end-to-end": 190.0,
    "idle": 60.0,
    "scale": 300.0,
}
"""After so long no further round is begun, unless those before have left time over."""
_PATIENCE: Final = 1.6
"""After so many times that, a benchmark is given up."""
_ROUNDS_END: Final = 0.85
"""A round that has begun, and the end of the processes, take their time, too."""
# What is compared with goals comes first, and gets the rates that the goals are about.
_LATENCIES: Final[tuple[tuple[Kind, latency.Work, tuple[float, ...]], ...]] = (
    ("stream", "same", (100, 200)),
    ("plain", "same", (50, 200)),
    ("floor", "same", (200,)),
    ("windows", "same", (100, 200)),
    ("stream", "same", (1, 50, 1000)),
    ("stream", "examples", (100, 200)),
    ("glue, arq tuned", "same", (50, 200)),
    ("plain", "examples", (200,)),
    ("glue, arq with its defaults", "same", (50,)),
    ("Debezium's engine", "same", (50,)),
    ("Debezium's engine tuned", "same", (50,)),
)


async def measure(
    report: Report,
    *,
    rounds: int,
    share: float,
    only: Sequence[str] | None,
    measured: Callable[[], object],
) -> None:
    """Run one after the other, and add the figures to the report.

    Args:
        report: gets the figures.
        rounds: of each case, if there is time.
        share: of the sizes and times of a full run.
        only: names of those that are run; None: all.
        measured: called after each.
    """
    ends = time.monotonic() + LONGEST_SECONDS
    chosen = [name for name in NAMES if only is None or name in only]
    for at, name in enumerate(chosen):
        later = sum(_SECONDS[one] for one in chosen[at + 1 :])
        left = ends - time.monotonic()
        share_of_time = min(left, max(_SECONDS[name], left - later))
        tell(f"{name}: {left / 60:.1f} minutes are left for this and what follows")
        began = time.monotonic()
        try:
            async with asyncio.timeout(min(left, share_of_time * _PATIENCE)):
                await _one(name, report, rounds, share, began + share_of_time * _ROUNDS_END)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others are to be measured
            failure = DemoError("its time was over") if isinstance(error, TimeoutError) else error
            report.fail(name, failure)
            tell(f"{name}: failed: {failure}")
        report.note(f"{name} took {time.monotonic() - began:.0f} s")
        measured()


def _one(name: str, report: Report, rounds: int, share: float, until: float) -> Awaitable[None]:
    def sized(full: int) -> int:
        return max(1_000, int(full * share))

    match name:
        case "drain":
            return drain.measure(report, changes=sized(30_000), rounds=rounds, only=None, until=until)
        case "latency":
            return _latencies(report, rounds, 2.5 * share, until)
        case "catch-up":
            return catch_up.measure(
                report,
                changes=sized(200_000),
                rounds=rounds,
                rows=100,
                workers=1,
                transports=("stream",),
                until=until,
            )
        case "end-to-end":
            return end_to_end.measure(report, seconds=60 * share, rounds=rounds, workers=1, only=None)
        case "idle":
            return idle.measure(report, seconds=30 * share, rounds=rounds)
        case _:
            return scale.measure(
                report,
                changes=sized(10_000),
                largest=max(scale.BACKLOGS) if share >= 1 else min(scale.BACKLOGS),
                rounds=rounds,
                only=None,
                until=until,
            )


async def _latencies(report: Report, rounds: int, seconds: float, until: float) -> None:
    left = len(_LATENCIES)
    for kind, work, rates in _LATENCIES:
        mine = time.monotonic() + max(0.0, until - time.monotonic()) * (2 if left > 1 else 1) / (left + 1)
        await latency.measure(
            report,
            kinds=[kind],
            rates=rates,
            seconds=seconds,
            rounds=rounds,
            poll_interval=0.02,
            works=[work],
            until=mine,
        )
        left -= 1
