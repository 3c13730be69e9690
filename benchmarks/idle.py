"""Idle: what listener and worker take while nothing happens, and how often they ask Redis and Postgres.

Processor time is that of the process's threads as the kernel counts it, memory what is resident. Calls to
Postgres are the statements in its own log, which is on only while they are counted.
"""

import asyncio
import re
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.backlog import open_redis
from benchmarks.contenders import FAILURES, tell
from benchmarks.pipelines import OURS, Pipeline, pipeline
from benchmarks.report import Report
from benchmarks.stack import resident
from examples.demo.processes import Child

TITLE = "processor, memory, and calls to Redis and Postgres of each process with nothing to do"
_SETTLE_SECONDS: Final = 10.0
_LOGGED: Final = "tailrace calls"
_STATEMENT: Final = re.compile(rf"^{_LOGGED} \[(.*?)\] LOG: +(?:statement|execute .*?): ", re.MULTILINE)
_LOGGING_ON: Final = (
    f"alter system set log_line_prefix = '{_LOGGED} [%a] '",
    "alter system set log_statement = 'all'",
)
_LOGGING_OFF: Final = ("alter system reset log_statement",)
_RELOAD: Final = "select pg_reload_conf()"


async def measure(report: Report, *, seconds: float, rounds: int) -> None:
    """Let the processes of each kind of delivery be idle at the same time, and add what they took.

    Args:
        report: gets the figures.
        seconds: of all rounds together.
        rounds: into how many parts they are cut.
    """
    async with AsyncExitStack() as opened:
        idlers = list[_Idle]()
        for kind in OURS:
            try:
                made = await opened.enter_async_context(pipeline(kind))
                await made.start()
            except FAILURES as error:
                report.fail(f"idle: {kind}", error)
                continue
            idlers.append(_Idle(made, opened))
        await asyncio.sleep(_SETTLE_SECONDS)
        for number in range(rounds):
            await asyncio.gather(*(one.begin() for one in idlers))
            await asyncio.sleep(seconds / rounds)
            await asyncio.gather(*(one.look() for one in idlers))
            tell(f"idle: round {number + 1} of {rounds}")
        for one in idlers:
            one.add(report)
            await one.made.end()
            report.remember(one.made.running.memory)
    for figure, unit in (("processor", "% of a core"), ("memory", "MiB")):
        found = [one.value for one in report.results if re.fullmatch(rf"idle: .*, {figure}", one.case)]
        if found:
            name = "busiest" if figure == "processor" else "largest"
            report.add(f"idle: {name} process", unit, [max(found)])
    report.note(f"idle: {seconds:g} s in {rounds} rounds; one handler, one worker")


class _Idle:
    """The processes of one kind of delivery."""

    def __init__(self, made: Pipeline, opened: AsyncExitStack) -> None:
        self.made = made
        self._redis: Any = open_redis(made.running.redis_url)
        opened.push_async_callback(self._redis.aclose)
        self._log = made.running.folder / "postgres" / "postgres.log"
        self._began = 0.0
        self._figures: dict[tuple[str, str], list[float]] = {}
        self._processor = dict[Child, float]()
        self._log_size = self._commands = 0

    async def begin(self) -> None:
        """Note how far everything is."""
        await self._logging(*_LOGGING_ON)
        self._log_size = self._log.stat().st_size
        self._commands = await self._asked_of_redis()
        self._processor = {child: _processor_seconds(child) for child in self.made.children}
        self._began = time.monotonic()

    async def look(self) -> None:
        """Take the figures of a round."""
        self.made.check()
        took = time.monotonic() - self._began
        for child, before in self._processor.items():
            process = child.name.split()[0]
            self._take(
                f"{process}, processor", "% of a core", (_processor_seconds(child) - before) / took * 100
            )
            self._take(f"{process}, memory", "MiB", resident(child))
        calls = await self._asked_of_redis() - self._commands - 1  # the look itself
        self._take("calls of Redis", "a minute", calls / took * 60)
        await self._logging(*_LOGGING_OFF)
        with self._log.open("rb") as log:
            log.seek(self._log_size)
            names = Counter(_STATEMENT.findall(log.read().decode(errors="replace")))
        ours = sum(count for name, count in names.items() if name.startswith("tailrace"))
        self._take("calls of Postgres", "a minute", ours / took * 60)

    def add(self, report: Report) -> None:
        """Add the figures to the report."""
        for (case, unit), rounds in self._figures.items():
            report.add(f"idle: {self.made.kind}, {case}", unit, rounds)

    def _take(self, case: str, unit: str, value: float) -> None:
        self._figures.setdefault((case, unit), []).append(value)

    async def _asked_of_redis(self) -> int:
        return int((await self._redis.info("stats"))["total_commands_processed"])

    async def _logging(self, *statements: str) -> None:
        for statement in (*statements, _RELOAD):
            await self.made.running.db.execute(statement)
        await asyncio.sleep(
            0.2
        )  # a server's processes read their settings when they next have something to do


def _processor_seconds(child: Child) -> float:
    """Read the time that all threads of a process have been on a processor."""
    found = 0
    for thread in Path(f"/proc/{child.pid}/task").iterdir():
        found += int((thread / "schedstat").read_text().split()[0])
    return found / 1e9
