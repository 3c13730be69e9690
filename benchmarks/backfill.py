"""A backfill of a large table while the table changes: how long it takes, memory, and whether all is right.

The rows are there before the listener begins, so that nothing but the backfill derives from them. The handler
is the worked example. In the end the derived table must be what is computed from the orders, to the cent.
"""

import asyncio
import random
import time
from typing import Final

from benchmarks.contenders import tell
from benchmarks.report import Report
from benchmarks.stack import ORDERS, PYTHON, Stack, high_water, stack
from examples.demo.database import connect
from examples.demo.processes import Child, DemoError

TITLE = "a backfill of a million rows while others change, proven delivery"
GOAL_PROCESS_MIB: Final = 150
_SHORT: Final = 0.02
_HANDLERS: Final = "handlers.customer_totals"
_SECONDS: Final = 3600.0
_TICK_SECONDS: Final = 0.02
_WRITERS: Final = 2
"""One connection, that waits for each commit, does not come to 500 a second beside all else."""

_TABLES = """
create table public.customer_totals (
  customer_id bigint primary key, orders integer not null, amount numeric(14,2) not null
);
"""
_ROWS = (
    "insert into orders (customer_id, status, amount)"
    " select 1 + n % {customers}, 'new', (n % 50000) / 100.0 from generate_series(1, {rows}) n"
)
_INSERT = "insert into orders (customer_id, status, amount) values ($1, 'new', $2)"
_UPDATE = "update orders set amount = $2, customer_id = $3 where id = $1"
_DIFFERENCES = """
select count(*) from (
  select customer_id, count(*) as orders, sum(amount) as amount from orders group by customer_id
) computed full join customer_totals derived using (customer_id)
where (computed.orders, computed.amount) is distinct from (derived.orders, derived.amount)
"""
_DONE = "select count(*) from tailrace.backfills where state = 'done'"


async def measure(report: Report, *, rows: int, rate: float) -> None:
    """Fill the table, backfill it while it changes, and add the figures to the report.

    Raises:
        DemoError: a process ended, or what is derived is not what it should be.
    """
    customers = max(1, rows // 20)
    async with stack(_HANDLERS, ORDERS + _TABLES, {"WORKER_DELIVERY": "proven"}) as running:
        await running.db.execute(_ROWS.format(rows=rows, customers=customers))
        await running.db.execute("analyze orders")
        children = (await running.listener(), await running.worker())
        writers = [_Writer(running.database_url, rows, customers, seed) for seed in range(_WRITERS)]
        writing = [
            asyncio.create_task(writer.write(rate / _WRITERS), name="benchmark: writer") for writer in writers
        ]
        try:
            seconds = await _backfill(running, children)
        finally:
            for one in writing:
                one.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
        began = time.monotonic()
        await _equal(running, children)
        settled = time.monotonic() - began
        memory = {"listener": high_water(children[0]), "worker": high_water(children[1])}
    report.note(
        f"{rows} rows of {customers} customers; {sum(one.written for one in writers)} changes meanwhile"
    )
    report.add("backfill", "rows/s", [rows / seconds])
    report.add("backfill, whole", "s", [seconds])
    reached = sum(one.written / one.seconds for one in writers if one.seconds)
    report.add("changes meanwhile", "changes/s", [reached])
    # Beside fewer changes than were wanted the run would show less than it says.
    report.below("short of the wanted changes", max(0.0, rate - reached), _SHORT * rate, "changes/s")
    report.add("until all was equal after the last change", "s", [settled])
    for name, mib in memory.items():
        report.add(f"memory of the {name}", "MiB", [mib])
        report.below(f"memory of the {name}", mib, GOAL_PROCESS_MIB, "MiB")


async def _backfill(running: Stack, children: tuple[Child, ...]) -> float:
    command = [*PYTHON, "worker", "backfill", "orders", "--rate", "1000000", "--no-wait"]
    began = time.monotonic()
    asked = await running.children.start("backfill", command, running.settings)
    await asked.succeed()
    shown = began
    while not await running.db.fetchval(_DONE):
        for child in children:
            if child.ended:
                raise child.explained()
        if time.monotonic() > shown + 10:
            shown = time.monotonic()
            rows = await running.db.fetchval("select rows from tailrace.backfills")
            tell(f"backfill: {rows} rows after {shown - began:.0f} s")
        if time.monotonic() > began + _SECONDS:
            raise DemoError(f"the backfill was not done after {_SECONDS:.0f} s: see {running.folder}")
        await asyncio.sleep(0.1)
    return time.monotonic() - began


async def _equal(running: Stack, children: tuple[Child, ...]) -> None:
    """Wait until what is derived is what is computed; what never gets so fails the run."""
    deadline = time.monotonic() + 120.0
    while differences := await running.db.fetchval(_DIFFERENCES):
        for child in children:
            if child.ended:
                raise child.explained()
        if time.monotonic() > deadline:
            raise DemoError(f"{differences} customers have wrong totals: see {running.folder}")
        await asyncio.sleep(0.5)
    if gaps := await running.db.fetchval("select count(*) from tailrace.gaps"):
        raise DemoError(f"{gaps} gaps: see {running.folder}")


class _Writer:
    """Writes single rows at a steady rate: new orders, and old ones that move to another customer."""

    def __init__(self, url: str, rows: int, customers: int, seed: int) -> None:
        self._url = url
        self._rows = rows
        self._customers = customers
        self._chance = random.Random(seed)  # noqa: S311 - orders, not secrets
        self.written = 0
        self.seconds = 0.0

    async def write(self, rate: float) -> None:
        """Write until cancelled."""
        chance, began = self._chance, time.monotonic()
        db = await connect(self._url)
        try:
            while True:
                while self.written < (time.monotonic() - began) * rate:
                    customer, amount = chance.randint(1, self._customers), chance.randint(1, 9999)
                    if chance.random() < 0.5:
                        await db.execute(_INSERT, customer, amount)
                    else:
                        await db.execute(_UPDATE, chance.randint(1, self._rows), amount, customer)
                    self.written += 1
                    self.seconds = time.monotonic() - began
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            await db.close()
