"""Catch-up: changes that were committed while nothing ran, until they are derived.

Proven delivery; the floor reads a slot by hand. Glue has no part in it: what it missed it does not get.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

from benchmarks.contenders import Contender, interleave, tell
from benchmarks.pipelines import DEBEZIUM, Kind, Pipeline, missing, pipeline
from benchmarks.report import Report

TITLE = "changes a second after a time in which neither listener nor worker ran, proven delivery"
TRANSPORTS: Final[tuple[Kind, ...]] = ("stream", "windows")
_SECONDS = 180.0
_LOOK_SECONDS = 0.02


async def measure(
    report: Report,
    *,
    changes: int,
    rounds: int,
    rows: int,
    workers: int,
    transports: Sequence[Kind],
    until: float = math.inf,
) -> None:
    """Measure each way in turns, and add the figures to the report.

    Args:
        report: gets the figures.
        changes: missed in a round.
        rounds: how often each is measured.
        rows: of each commit.
        workers: of ours.
        transports: how ours reads the log.
        until: when no further round is begun, by the monotonic clock.
    """
    async with AsyncExitStack() as opened:
        contenders, waits = list[Contender](), dict[Kind, list[float]]()
        pipelines = list[Pipeline]()
        for kind in ("floor", *transports, *DEBEZIUM[:1]):
            if (why := missing(kind)) is not None:
                report.skip(why)
                continue
            made = await opened.enter_async_context(pipeline(kind, workers=workers))
            pipelines.append(made)
            await made.start()  # from now on there is a slot
            await made.end()
            waits[kind] = []
            one = _Missed(made, changes, rows, waits[kind])
            floor = None if kind == "floor" else "catch-up: floor"
            contenders.append(Contender(f"catch-up: {kind}", one.measure, floor, _SECONDS))
        await interleave(report, contenders, rounds, "changes/s", until=until)
        for made in pipelines:
            report.remember(made.running.memory)
        for kind, seconds in waits.items():
            if seconds:
                report.add(f"catch-up: {kind}, from the start of its processes", "s", seconds)
    report.note(
        f"catch-up: {changes} changes missed, {rows} rows a commit, {rounds} rounds;"
        f" {workers} worker{'s' if workers > 1 else ''}"
    )


class _Missed:
    """One way, whose processes are down between rounds."""

    def __init__(self, made: Pipeline, changes: int, rows: int, waits: list[float]) -> None:
        self._made = made
        self._changes = changes
        self._rows = rows
        self._waits = waits

    async def measure(self) -> float:
        """Write what is missed, start all processes, and wait until it is derived; returns the rate."""
        made = self._made
        for _ in range(0, self._changes, self._rows):
            await made.write(self._rows)
        await made.running.db.execute("checkpoint")
        before = await made.progress()
        wanted = before + -(-self._changes // self._rows) * self._rows
        started = time.monotonic()
        try:
            await made.launch()
            began, first = started, before
            while (found := await made.progress()) < wanted:
                made.check()
                if first == before and found > before:  # the start of the processes is not their rate
                    began, first = time.monotonic(), found
                await asyncio.sleep(_LOOK_SECONDS)
            ended = time.monotonic()
        finally:
            await made.end()
        await made.check_rows()
        self._waits.append(ended - started)
        tell(f"{made.kind}: {ended - started:.1f} s from the start of its processes to all derived")
        return (wanted - first) / (ended - began)
