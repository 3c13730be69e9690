"""Changes that fail: they hold back their own key, are dead letters in the end, and lose nobody else's."""

import asyncio
import json
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator

import pytest

from tests.e2e import failing_handlers
from tests.e2e.test_proven import drop_slot, ready
from tests.stack import Project, Servers, project

QUICK = {
    "WORKER_DELIVERY": "proven",
    "WORKER_MAX_ATTEMPTS": "3",
    "WORKER_BACKOFF_SECONDS": "0.05",
    "WORKER_LANES": "4",
}


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    async with project(shared, failing_handlers.TABLES, "tests.e2e.failing_handlers", **QUICK) as made:
        yield made
        await drop_slot(made)


async def write(
    shop: Project, statuses: list[str], *, customers: int, first: int = 1
) -> dict[int, list[int]]:
    """Insert an order for each status, in one commit each; returns the good ones of each customer."""
    good: dict[int, list[int]] = defaultdict(list)
    for version, status in enumerate(statuses, start=first):
        customer = version % customers
        await shop.db.execute(
            "insert into orders (customer_id, status, version) values ($1, $2, $3)", customer, status, version
        )
        if status == "new":
            good[customer].append(version)
    return dict(good)


async def applied(shop: Project, which: str = "true") -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    query = f"select customer_id, version from derived_log where {which} order by seq"
    for row in await shop.db.fetch(query):
        found[row[0]].append(row[1])
    return dict(found)


async def test_poison_rows_become_dead_letters_are_mended_and_redriven_in_order(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    chance = random.Random(1)
    statuses = ["poison" if chance.random() < 0.01 else "new" for _ in range(4_000)]
    poisoned = statuses.count("poison")
    good: dict[int, list[int]] = defaultdict(list)
    bad: dict[int, list[int]] = defaultdict(list)
    for version, status in enumerate(statuses):
        (bad if status == "poison" else good)[version % 500].append(version)
    for first in range(0, 4_000, 20):
        await shop.db.execute(
            "insert into orders (customer_id, status, version)"
            " select ($2::int + n) % 500, ($1::text[])[n + 1], $2 + n from generate_series(0, 19) n",
            statuses[first : first + 20],
            first,
        )
    await shop.until("select count(*) from tailrace.held where status = 'dead'", poisoned, 60)
    await shop.until("select count(*) from derived_log", 4_000 - poisoned, 60)
    assert await applied(shop) == good
    dead = await shop.db.fetch("select attempts, error_class, error, traceback from tailrace.held")
    assert {tuple(row)[:3] for row in dead} == {(3, "ValueError", "this order is poison")}
    for row in dead:
        assert "failing_handlers.py" in row["traceback"].splitlines()[1]  # nothing of the worker before it

    await shop.db.execute("insert into derived_mended default values")
    code, output = await shop.run("dead-letters", "redrive", "--all", "--json")
    assert (code, len(json.loads(output))) == (0, poisoned)
    await shop.until("select count(*) from derived_log", 4_000, 60)
    assert await applied(shop, "source = 'redrive'") == bad
    assert await applied(shop, "source <> 'redrive'") == good
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0


async def test_a_change_that_crashes_its_worker_is_found_out(shop: Project) -> None:
    await ready(shop)
    statuses = ["new"] * 60
    statuses[30] = "crash"
    good = await write(shop, statuses, customers=3)
    deaths = 0
    while True:
        worker = await shop.worker(wait=False)
        dead = asyncio.create_task(
            shop.until("select count(*) from tailrace.held where status = 'dead'", 1, 60), name="test: dead"
        )
        died = asyncio.create_task(worker.ended(60), name="test: died")
        await asyncio.wait({dead, died}, return_when=asyncio.FIRST_COMPLETED)
        finished = dead.done()
        for task in (dead, died):
            task.cancel()
        await asyncio.gather(dead, died, return_exceptions=True)
        if finished:
            break
        deaths += 1
    await shop.until("select count(*) from derived_log", 59)
    assert deaths == 3
    assert await applied(shop) == good
    assert await shop.db.fetchval("select error_class from tailrace.held") == "worker.errors.WorkerDied"


async def test_what_fails_keeps_its_order_while_workers_are_killed(shop: Project) -> None:
    await ready(shop)
    chance = random.Random(5)
    worker = await shop.worker()
    statuses = ["poison" if chance.random() < 0.05 else "new" for _ in range(1_200)]
    writing = asyncio.create_task(write(shop, statuses, customers=20), name="test: writing")
    for _ in range(3):
        await asyncio.sleep(chance.uniform(0.5, 1.5))
        await worker.kill()
        worker = await shop.worker(wait=False)
    good = await writing
    await shop.until("select count(*) from tailrace.held where status = 'dead'", statuses.count("poison"), 60)
    await shop.until("select count(*) from derived_log", statuses.count("new"), 60)
    assert await applied(shop) == good


@pytest.mark.slow
async def test_a_worker_frozen_in_its_transaction_loses_its_lane_and_commits_nothing(shop: Project) -> None:
    await ready(shop)
    frozen = await shop.worker(WORKER_HANDLER_TIMEOUT="3")
    good = await write(shop, ["slow", "new", "new"], customers=1)
    # Between the handler's statement and its end.
    await shop.until(
        "select count(*) from pg_stat_activity"
        " where state = 'idle in transaction' and query like 'insert into derived_log%'",
        1,
    )
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        second = await shop.worker(WORKER_HANDLER_TIMEOUT="3")
        await shop.until("select count(*) from derived_log", 3)
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    await second.kill()
    # It alone can apply these, and not before its old pass over their lane has ended.
    good[0] += (await write(shop, ["new"] * 20, customers=1, first=4))[0]
    await shop.until("select count(*) from derived_log", 23)
    assert await applied(shop) == {0: [1, *good[0]]}
    counted = await shop.db.fetchrow("select sum(read)::int, sum(applied)::int from tailrace.lanes")
    assert tuple(counted) == (23, 23)
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0
    assert frozen.process.returncode is None
