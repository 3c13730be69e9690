"""One huge transaction in proven delivery: what listener, worker and Redis need for it, and its rate.

Memory is the high-water mark of each process (`VmHWM`), as Linux keeps it; what Redis needed is its own
`used_memory_peak`. The handler counts how often it is given each row, so that a row left out or applied twice
fails the run.
"""

import time
from typing import Final, Literal

from redis.asyncio import Redis

from benchmarks.report import Report
from benchmarks.stack import ORDERS, high_water, stack
from benchmarks.workloads.once import TABLES
from examples.demo.database import Connection
from examples.demo.processes import DemoError

TITLE = "memory and rate of one huge transaction, proven delivery"
GOAL_PROCESS_MIB: Final = 200
GOAL_REDIS_MIB: Final = 256
"""The default of WORKER_MAX_BACKLOG_BYTES."""
Transport = Literal["stream", "windows"]
_SECONDS: Final = 1800.0

_INSERT = (
    "insert into orders (customer_id, status, amount)"
    " select 1 + n % 200, 'new', (n % 50000) / 100.0 from generate_series(1, {rows}) n"
)
_APPLIED = "select coalesce(sum(applied), 0)::bigint from tailrace.lanes"


async def measure(report: Report, *, rows: int, transport: Transport, settings: dict[str, str]) -> None:
    """Commit the transaction, wait until all of it is applied, and add the figures to the report.

    Raises:
        DemoError: a process ended, a row was not applied, or one twice.
    """
    chosen = {"WORKER_DELIVERY": "proven"} | settings
    async with stack("benchmarks.workloads.once", ORDERS + TABLES, chosen) as running:
        if transport == "windows":
            await running.read_in_windows()
        listener, worker = await running.listener(), await running.worker()
        redis: Redis = Redis.from_url(running.redis_url)
        try:
            empty = int((await redis.info("memory"))["used_memory"])
            await running.db.execute(_INSERT.format(rows=rows))
            committed = time.monotonic()
            await running.until(_APPLIED, rows, seconds=_SECONDS, children=(listener, worker))
            seconds = time.monotonic() - committed
            peak = int((await redis.info("memory"))["used_memory_peak"]) - empty
        finally:
            await redis.aclose()
        memory = {"listener": high_water(listener), "worker": high_water(worker)}
        await _once_each(running.db, rows)
    report.note(f"{rows} rows in one transaction, read by {transport}; settings: {settings or 'defaults'}")
    report.add("rate", "changes/s", [rows / seconds])
    for name, mib in memory.items():
        report.add(f"memory of the {name}", "MiB", [mib])
        report.below(f"memory of the {name}", mib, GOAL_PROCESS_MIB, "MiB")
    report.add("memory of Redis above empty", "MiB", [peak / 2**20])
    report.below("memory of Redis above empty", peak / 2**20, GOAL_REDIS_MIB, "MiB")


async def _once_each(db: Connection, rows: int) -> None:
    """See that every row was applied once.

    Raises:
        DemoError: it was not.
    """
    called = tuple(await db.fetchrow("select count(*), coalesce(max(times), 0) from derived_calls"))
    gaps = await db.fetchval("select count(*) from tailrace.gaps")
    if (*called, gaps) != (rows, 1, 0):
        raise DemoError(f"{rows} rows: {called[0]} applied, up to {called[1]} times, {gaps} gaps")
