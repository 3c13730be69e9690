"""End to end: commits as fast as all of it can take them, for a while, with everything on this machine.

The writer commits as fast as Postgres lets it until it is some thousands of changes ahead of what is derived,
then waits for them: so the rate is one that lasts, and not one at which a backlog grows. What is counted are
derived changes; the rounds are parts of the one run.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from benchmarks.contenders import FAILURES, tell
from benchmarks.pipelines import Kind, Pipeline, missing, pipeline
from benchmarks.report import Report
from examples.demo.processes import DemoError

TITLE = "changes a second from commits to derived rows, writer and servers on the same machine"
FLOOR: Final = "end-to-end: floor"
_SETTLE_SECONDS = 60.0
_WARM_UP_SECONDS = 5.0
_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        kind: which way.
        rows: of a commit.
        ahead: how many changes the writer may be ahead.
        share: part of the time; the one with a goal gets all of it.
    """

    kind: Kind
    rows: int
    ahead: int
    share: float = 0.15

    @property
    def title(self) -> str:
        """In the report."""
        return f"end-to-end: {self.kind}" + (", 1 row a commit" if self.rows == 1 else "")


CASES: Final = (
    Case("floor", 100, 20_000),
    Case("stream", 100, 20_000, share=1.0),
    Case("windows", 100, 20_000),
    Case("plain", 100, 5_000),
    Case("stream", 1, 20_000),
    Case("Debezium's engine", 100, 20_000),
    Case("glue, arq tuned", 1, 1_000),
    Case("glue, arq with its defaults", 1, 1_000),
)


async def measure(
    report: Report, *, seconds: float, rounds: int, workers: int, only: Sequence[Kind] | None
) -> None:
    """Run each case, and add the figures to the report; one that fails is named there.

    Args:
        report: gets the figures.
        seconds: of the case with a goal; the others run for a part of it.
        rounds: into how many parts a run is cut.
        workers: of ours.
        only: these ways; None: all.
    """
    for case in CASES:
        if only is not None and case.kind not in only:
            continue
        if (why := missing(case.kind)) is not None:
            report.skip(why)
            continue
        length = seconds * case.share
        try:
            async with (
                asyncio.timeout(length + 3 * _SETTLE_SECONDS),
                pipeline(case.kind, workers=workers) as made,
            ):
                await made.start()
                rates, whole = await _run(made, case, length, rounds)
                await made.end()
                await made.check_rows()
                report.remember(made.running.memory)
        except FAILURES as error:
            report.fail(case.title, error)
            tell(f"{case.title}: failed: {error}")
            continue
        tell(f"{case.title}: {whole:,.0f} changes/s")
        report.add(case.title, "changes/s", rates, floor=report.found(FLOOR))
        if case.share == 1:
            report.add(f"{case.title}, whole run", "changes/s", [whole])
            report.add(f"{case.title}, length of the run", "s", [length])
    report.note(
        f"end-to-end: {seconds:g} s for stream, {CASES[0].share:.0%} of that for the others, cut in {rounds};"
        f" {CASES[0].rows} rows a commit, except where it says 1; workers: {workers}"
    )


async def _run(made: Pipeline, case: Case, seconds: float, rounds: int) -> tuple[list[float], float]:
    """Write for so long; returns the rate of each part, and that of all of it."""
    writer = _Writer(made, case, await made.progress())
    writing = asyncio.create_task(writer.write(), name="end-to-end: writer")
    try:
        # A reader that found nothing for a while looks at longer intervals: let it see that there is work.
        warm = time.monotonic() + min(_WARM_UP_SECONDS, seconds / 2)
        while time.monotonic() < warm:
            await asyncio.sleep(_LOOK_SECONDS)
            writer.derived = await made.progress()
        looks = [(time.monotonic(), writer.derived)]
        for _ in range(rounds):
            until = looks[-1][0] + seconds / rounds
            while time.monotonic() < until:
                if writing.done():
                    writing.result()
                made.check()
                await asyncio.sleep(max(0.0, min(_LOOK_SECONDS, until - time.monotonic())))
                writer.derived = await made.progress()
            looks.append((time.monotonic(), writer.derived))
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)
    await _settle(made, writer)
    rates = [(later - earlier) / (end - begin) for (begin, earlier), (end, later) in pairwise(looks)]
    return rates, (looks[-1][1] - looks[0][1]) / (looks[-1][0] - looks[0][0])


async def _settle(made: Pipeline, writer: "_Writer") -> None:
    """See that everything that was written is derived in the end."""
    wanted = writer.first + made.written - writer.before
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (found := await made.progress()) < wanted:
        made.check()
        if time.monotonic() > deadline:
            raise DemoError(f"{wanted - found} of {made.written} changes are not derived")
        await asyncio.sleep(_LOOK_SECONDS)


class _Writer:
    """Commits, on a connection of its own, until it is too far ahead."""

    def __init__(self, made: Pipeline, case: Case, derived: int) -> None:
        self._made = made
        self._case = case
        self.before = made.written
        self.first = self.derived = derived

    async def write(self) -> None:
        made, case = self._made, self._case
        db = await made.connect()
        try:
            while True:
                if (made.written - self.before) - (self.derived - self.first) < case.ahead:
                    await made.write(case.rows, db)
                else:
                    await asyncio.sleep(_LOOK_SECONDS / 10)
        finally:
            await db.close()
