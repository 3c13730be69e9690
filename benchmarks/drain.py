"""Drain rate: a full backlog in Redis is applied by workers that were started before it is let go.

Beside it the same rows are made by a loop written by hand (the floor) and by the usual glue (jobs of a job
runner). Rates are taken from the commit times of the derived rows: from the first commit to the last, without
the rows of the first.
"""

import importlib.util
import math
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Final

import orjson

from benchmarks.backlog import APPLIED, Backlog, open_redis
from benchmarks.contenders import Contender, interleave
from benchmarks.floor import STREAM
from benchmarks.glue.orders import payload
from benchmarks.report import Report
from benchmarks.stack import ORDERS, PYTHON, Stack, stack
from benchmarks.workloads import TABLES
from examples.demo.processes import Child, DemoError

TITLE = (
    "changes a second from a full Redis backlog to derived rows, beside a hand-written loop and usual glue"
)
WORKERS: Final = (1, 2)
_AT_ONCE = 500
_SECONDS = 180.0


@dataclass(frozen=True)
class Workload:
    """One kind of handler.

    Attributes:
        name: its module in benchmarks/workloads, and the handler's name.
        title: in the report.
        floor: what the floor does for comparison.
        share: part of the backlog that it is given: the slow one needs no more to be measured.
    """

    name: str
    title: str
    floor: str
    share: float = 1.0


WORKLOADS: Final = (
    Workload("derive", "derive handler", "derive"),
    Workload("batch", "change handler, batch=500", "batch"),
    Workload("single", "change handler, one at a time", "batch", share=0.2),
)
_FLOORS: Final = {"derive": "floor, keys of 500 at once", "batch": "floor, batches of 500"}


@dataclass(frozen=True)
class Glue:
    """One job runner.

    Attributes:
        title: in the report.
        module: in benchmarks/glue.
        command: starts its worker.
        share: part of the backlog that it is given.
        needs: module without which it is skipped.
        workers: how many worker processes are tried.
    """

    title: str
    module: str
    command: tuple[str, ...]
    share: float
    needs: str
    workers: tuple[int, ...] = (1,)


GLUE: Final = (
    Glue(
        "arq with its defaults",
        "arq_jobs",
        ("arq", "benchmarks.glue.arq_jobs.Default"),
        0.02,
        "arq",
        WORKERS,
    ),
    Glue("arq tuned", "arq_jobs", ("arq", "benchmarks.glue.arq_jobs.Tuned"), 0.1, "arq", WORKERS),
    Glue("SAQ", "saq_jobs", ("saq", "benchmarks.glue.saq_jobs.settings"), 0.06, "saq"),
    Glue(
        "taskiq",
        "taskiq_jobs",
        ("taskiq", "worker", "benchmarks.glue.taskiq_jobs:broker", "--workers", "1"),
        0.06,
        "taskiq_redis",
    ),
    Glue(
        "Procrastinate",
        "procrastinate_jobs",
        ("procrastinate", "-a", "benchmarks.glue.procrastinate_jobs.app", "worker", "--concurrency", "50"),
        0.02,
        "procrastinate",
    ),
)
_LEAST: Final = 500

_COMMITS = """
select extract(epoch from at)::float8, count(*)
from (select pg_xact_commit_timestamp(xmin) as at from derived_orders) made group by at order by at
"""
_DERIVED = "select count(*) from derived_orders"


async def measure(
    report: Report, *, changes: int, rounds: int, only: Sequence[str] | None, until: float = math.inf
) -> None:
    """Measure each kind of handler, floor and glue in turns, and add the figures to the report.

    Args:
        report: gets the figures.
        changes: backlog of a round.
        rounds: how often each is measured.
        only: names of workloads, or `glue`; None: all.
        until: when no further round is begun, by the monotonic clock.

    Raises:
        DemoError: a backlog could not be written.
    """
    chosen = [one for one in WORKLOADS if only is None or one.name in only]
    with_glue = only is None or "glue" in only
    contenders = list[Contender]()
    async with AsyncExitStack() as opened:
        stacks = list[Stack]()
        for workload in chosen:
            case = await _opened(opened, workload, max(1000, int(changes * workload.share)))
            await case.fill()
            stacks.append(case.running)
            contenders += case.contenders(floors={one.case for one in contenders})
        if with_glue:
            case = await _opened(opened, WORKLOADS[-1], 0)
            stacks.append(case.running)
            for one in GLUE:
                contenders += _glue(report, case, one, changes)
        # Nobody needs it any more, and while it looks at its slots it takes time from those who are measured.
        for running in stacks:
            await running.end(running.standin)
        await interleave(report, contenders, rounds, "changes/s", until=until)
        for running in stacks:
            report.remember(running.memory)
    report.note(f"drain: backlog of {changes} changes, {rounds} rounds, batches of 500, 16 lanes")


async def _opened(opened: AsyncExitStack, workload: Workload, changes: int) -> "_Case":
    limits = {"WORKER_MAX_BACKLOG": str(changes * 2 + 1000), "WORKER_MAX_BACKLOG_BYTES": "4GiB"}
    running = await opened.enter_async_context(
        stack(f"benchmarks.workloads.{workload.name}", ORDERS + TABLES, limits)
    )
    redis = open_redis(running.redis_url)
    opened.push_async_callback(redis.aclose)
    return _Case(running, redis, workload, changes)


class _Case:
    """Servers with the backlog of one kind of handler."""

    def __init__(self, running: Stack, redis: Any, workload: Workload, changes: int) -> None:  # noqa: ANN401 - redis-py types its commands for both of its clients
        self.running = running
        self._redis = redis
        self._workload = workload
        self._changes = changes
        self._backlog = Backlog(running, redis, "derived_orders")
        self._floor_kept: bytes | None = None

    async def fill(self) -> None:
        await self._backlog.fill(self._changes)

    def contenders(self, floors: set[str]) -> list[Contender]:
        """Return our workers, and their floor, unless it is measured already."""
        floor = f"drain: {_FLOORS[self._workload.floor]}"
        made = [] if floor in floors else [Contender(floor, self._floor, seconds=_SECONDS)]
        for workers in WORKERS:
            case = f"drain: {self._workload.title}, {_plural(workers)}"
            made.append(Contender(case, lambda workers=workers: self._drain(workers), floor, _SECONDS))  # type: ignore[misc]
        return made

    async def _drain(self, workers: int) -> float:
        """Start workers on empty lanes, let the backlog go, and wait for the end."""
        await self._backlog.reset()
        children = await self.running.workers(workers)
        try:
            await self._backlog.restore()
            await self.running.until(APPLIED, self._changes, seconds=_SECONDS, children=children)
        finally:
            await self.running.end(*children)
        return await self._rate(self._changes)

    async def _floor(self) -> float:
        await self._backlog.reset()
        derive = self._workload.floor == "derive"
        if self._floor_kept is None:
            await self._fill_floor(derive=derive)
            self._floor_kept = await self._redis.dump(STREAM)
        else:
            await self._redis.restore(STREAM, 0, self._floor_kept)
        urls = ("--database-url", self.running.database_url, "--redis-url", self.running.redis_url)
        command = [*PYTHON, "benchmarks.floor", "drain", *urls, "--kind", self._workload.floor]
        child: Child = await self.running.children.start("floor", command)
        try:
            await child.succeed()
        finally:
            await child.end()
        return await self._rate(self._changes)

    async def _fill_floor(self, *, derive: bool) -> None:
        for start in range(0, self._changes, _AT_ONCE):
            async with self._redis.pipeline(transaction=False) as pipe:
                for number in range(start, min(start + _AT_ONCE, self._changes)):
                    content = b"%d" % (number + 1) if derive else orjson.dumps(payload(number))
                    pipe.xadd(STREAM, {"e": content})
                await pipe.execute()

    async def run_jobs(self, glue: Glue, jobs: int, workers: int) -> float:
        """Fill the queue of a job runner, start its workers, and wait for the end."""
        running = self.running
        await self._redis.flushall()
        await running.db.execute("truncate derived_orders")
        await running.db.execute("checkpoint")
        settings = {"DATABASE_URL": running.database_url, "REDIS_URL": running.redis_url}
        filling = await running.children.start(
            f"{glue.module} filling", [*PYTHON, f"benchmarks.glue.{glue.module}", str(jobs)], settings
        )
        try:
            await filling.succeed()
        finally:
            await filling.end()
        children = [
            await running.children.start(f"{glue.module} {number}", [*PYTHON, *glue.command], settings)
            for number in range(workers)
        ]
        try:
            await running.until(_DERIVED, jobs, seconds=_SECONDS, children=tuple(children))
        finally:
            await running.end(*children)
        return await self._rate(jobs)

    async def _rate(self, expected: int) -> float:
        """Read changes a second from the commit times.

        Raises:
            DemoError: not every change has its derived row.
        """
        commits = await self.running.db.fetch(_COMMITS)
        rows = sum(count for _, count in commits)
        if rows != expected:
            raise DemoError(f"{expected} changes have {rows} derived rows")
        if len(commits) < 2:
            raise DemoError(f"{expected} changes were one transaction: too few to be measured")
        return float((rows - commits[0][1]) / (commits[-1][0] - commits[0][0]))


def _glue(report: Report, case: _Case, glue: Glue, changes: int) -> list[Contender]:
    if importlib.util.find_spec(glue.needs) is None:
        report.skip(f"{glue.title}: {glue.needs} is not installed")
        return []
    jobs = max(_LEAST, int(changes * glue.share))
    return [
        Contender(
            f"drain: glue, {glue.title}, {_plural(workers)}",
            lambda workers=workers: case.run_jobs(glue, jobs, workers),  # type: ignore[misc]
            seconds=_SECONDS,
        )
        for workers in glue.workers
    ]


def _plural(workers: int) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}"
