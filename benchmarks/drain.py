"""Drain rate: a backlog that waits in Redis is applied by workers that were started before it is let go.

The backlog is written once by a real listener, then kept aside (Redis's keys as they are, and the positions
of the lanes), so that each round begins from exactly the same state. Rates are taken from the commit times of
the derived rows: from the first commit to the last, without the rows of the first.
"""

import asyncio
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson
from redis.asyncio import Redis

from benchmarks.floor import STREAM
from benchmarks.report import Report
from benchmarks.stack import ORDERS, PYTHON, QUEUE, Stack, stack
from benchmarks.workloads import TABLES
from examples.demo.processes import Child, DemoError

TITLE = "changes a second from a full Redis backlog to derived rows, beside a hand-written loop"
WORKERS: Final = (1, 2)
_ROWS_AT_ONCE = 500
_FILL_SECONDS = 300.0
_DRAIN_SECONDS = 300.0


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

_INSERT = (
    "insert into orders (customer_id, status, amount)"
    " select 1 + n % 200, 'new', (n % 50000) / 100.0 from generate_series($1::int, $2::int) n"
)
_APPLIED = "select coalesce(sum(applied), 0)::bigint from tailrace.lanes"
_COMMITS = """
select extract(epoch from at)::float8, count(*)
from (select pg_xact_commit_timestamp(xmin) as at from derived_orders) made group by at order by at
"""
_RESET = """
truncate derived_orders;
delete from tailrace.lanes;
insert into tailrace.lanes select * from lanes_kept;
vacuum analyze
"""


async def measure(report: Report, *, changes: int, rounds: int, only: Sequence[str] | None) -> None:
    """Measure each kind of handler on a stack of its own, and add the figures to the report.

    Raises:
        DemoError: a process ended, or the backlog was not drained.
    """
    report.notes.append(f"backlog of {changes} changes; {rounds} rounds; batches of 500; 16 lanes")
    for workload in WORKLOADS:
        if only and workload.name not in only:
            continue
        backlog = max(1000, int(changes * workload.share))
        module = f"benchmarks.workloads.{workload.name}"
        limits = {"WORKER_MAX_BACKLOG": str(backlog * 2), "WORKER_MAX_BACKLOG_BYTES": "4GiB"}
        async with stack(module, ORDERS + TABLES, limits) as running:
            redis: Any = Redis.from_url(running.redis_url)
            try:
                await _Case(running, redis, workload, backlog).measure(report, rounds)
            finally:
                await redis.aclose()


class _Case:
    """One kind of handler with its backlog."""

    def __init__(self, running: Stack, redis: Any, workload: Workload, backlog: int) -> None:  # noqa: ANN401 - redis-py types its commands for both of its clients
        self._running = running
        self._redis = redis
        self._workload = workload
        self._backlog = backlog
        self._kept: dict[bytes, bytes] = {}

    async def measure(self, report: Report, rounds: int) -> None:
        """Fill once, then floor and workers in turn, so that a noisy minute hits all of them."""
        await self._fill()
        rates: dict[int, list[float]] = {workers: [] for workers in (0, *WORKERS)}
        for number in range(rounds):
            rates[0].append(await self._floor())
            for workers in WORKERS:
                rates[workers].append(await self._drain(workers))
            shown = ", ".join(f"{rate[-1]:,.0f}" for rate in rates.values())
            print(f"{self._workload.name}, round {number + 1} of {rounds}: floor, 1, 2 workers: {shown} /s")
        title = self._workload.title
        floor = report.add(f"floor for: {title}", "changes/s", rates[0])
        for workers in WORKERS:
            name = f"{title}, {workers} worker{'s' if workers > 1 else ''}"
            report.add(name, "changes/s", rates[workers], floor=floor.value)

    # The backlog

    async def _fill(self) -> None:
        """Let the listener write the backlog, and keep it aside."""
        running = self._running
        listener = await running.listener()
        url = await listener.said(
            lambda line: str(line["url"]) if line.get("message") == "health of the listener" else None
        )
        for start in range(0, self._backlog, _ROWS_AT_ONCE):
            end = min(start + _ROWS_AT_ONCE, self._backlog) - 1
            await running.db.execute(_INSERT, start, end)
        async with asyncio.timeout(_FILL_SECONDS):
            while await asyncio.to_thread(_queued, url, self._workload.name) < self._backlog:
                if listener.ended:
                    raise listener.explained()
                await asyncio.sleep(0.2)
        await listener.end()
        generation = await running.db.fetchval("select generation from tailrace.source")
        async for key in self._redis.scan_iter(f"{QUEUE}:{generation}:*", count=1000):
            self._kept[key] = await self._redis.dump(key)
        await running.db.execute("create table lanes_kept as table tailrace.lanes")

    async def _reset(self) -> None:
        await self._redis.flushall()
        for statement in _RESET.split(";"):
            await self._running.db.execute(statement)
        await self._running.db.execute("checkpoint")

    # Rounds

    async def _drain(self, workers: int) -> float:
        """Start workers on empty lanes, let the backlog go, and wait for the end."""
        await self._reset()
        children = tuple([await self._running.worker(number + 1) for number in range(workers)])
        try:
            async with self._redis.pipeline(transaction=True) as pipe:
                for key, value in self._kept.items():
                    pipe.restore(key, 0, value)
                await pipe.execute()
            await self._running.until(_APPLIED, self._backlog, seconds=_DRAIN_SECONDS, children=children)
        finally:
            await asyncio.gather(*(child.end() for child in children))
        return await self._rate()

    async def _floor(self) -> float:
        await self._reset()
        derive = self._workload.floor == "derive"
        for start in range(0, self._backlog, _ROWS_AT_ONCE):
            async with self._redis.pipeline(transaction=False) as pipe:
                for number in range(start, min(start + _ROWS_AT_ONCE, self._backlog)):
                    pipe.xadd(STREAM, {"e": b"%d" % (number + 1) if derive else _payload(number)})
                await pipe.execute()
        urls = ("--database-url", self._running.database_url, "--redis-url", self._running.redis_url)
        command = [*PYTHON, "benchmarks.floor", *urls, "--kind", self._workload.floor]
        child: Child = await self._running.children.start("floor", command)
        await child.succeed()
        return await self._rate()

    async def _rate(self) -> float:
        """Read changes a second from the commit times.

        Raises:
            DemoError: not every change has its derived row.
        """
        commits = await self._running.db.fetch(_COMMITS)
        rows = sum(count for _, count in commits)
        if rows != self._backlog:
            raise DemoError(f"{self._backlog} changes have {rows} derived rows")
        return float((rows - commits[0][1]) / (commits[-1][0] - commits[0][0]))


def _queued(url: str, handler: str) -> int:
    with urllib.request.urlopen(f"{url}/status", timeout=30) as answer:  # noqa: S310 - our own listener on loopback
        return int(json.load(answer)["handlers"][handler]["queued"])


def _payload(number: int) -> bytes:
    """Make a change as Realtime writes it, of the same row as the backlog's."""
    types = {
        "id": "int8",
        "customer_id": "int8",
        "status": "text",
        "amount": "numeric",
        "created_at": "timestamptz",
        "updated_at": "timestamptz",
    }
    return orjson.dumps(
        {
            "schema": "public",
            "table": "orders",
            "type": "INSERT",
            "commit_timestamp": "2026-01-02T03:04:05.678Z",
            "columns": [{"name": name, "type": kind} for name, kind in types.items()],
            "record": {
                "id": number + 1,
                "customer_id": 1 + number % 200,
                "status": "new",
                "amount": number % 50_000 / 100,
                "created_at": "2026-01-02T03:04:05.678901+00:00",
                "updated_at": None,
            },
            "errors": None,
        }
    )
