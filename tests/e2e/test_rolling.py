"""Releases under load: each process is replaced in turn, and versions meet; nothing is lost or doubled."""

import asyncio
import sys
from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.e2e import rolling_handlers as handlers
from tests.e2e.rolling_handlers import DIFFERENT, WRONG
from tests.e2e.test_proven import drop_slot
from tests.stack import Process, Project, Servers, project

ORDERS = 2_000


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    async with project(
        shared, handlers.TABLES, "tests.e2e.rolling_handlers", WORKER_DELIVERY="proven"
    ) as made:
        yield made
        await drop_slot(made)


async def write(shop: Project, changes: int) -> None:
    """Commit so many changes, a hundred at a time; each order's version counts them."""
    db = await asyncpg.connect(shop.database_url)
    try:
        for begin in range(0, changes, 100):
            first = begin % ORDERS
            await db.execute(
                "insert into orders select n, n % 50, 1 from generate_series($1::int, $1::int + 99) n"
                " on conflict (id) do update set version = orders.version + 1",
                first,
            )
    finally:
        await db.close()


async def during(shop: Project, changes: int, *deeds: object) -> None:
    """Write changes, and do something about the processes meanwhile."""
    async with asyncio.TaskGroup() as group:
        group.create_task(write(shop, changes), name="test: writer")
        for deed in deeds:
            group.create_task(deed, name="test: deed")  # type: ignore[arg-type] # a coroutine


async def settled(shop: Project, changes: int) -> None:
    await shop.until("select count(*) from derived_log", changes, 90)
    await shop.until(DIFFERENT, 0, 30)
    assert await shop.db.fetchval(WRONG) == 0
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0


async def listener(shop: Project) -> Process:
    started = await shop.listener(wait=False)
    await started.said("health of the")
    return started


async def replace_listener(shop: Project, old: Process, spare: Process) -> None:
    """As a rollout does it: a new one is there before the old one goes."""
    await spare.said("standing by")
    assert await old.terminate() == 0
    await spare.said("listening")


async def replace_worker(shop: Project, old: Process) -> None:
    await shop.worker()
    assert await old.terminate() == 0


@pytest.mark.slow
async def test_each_process_is_replaced_in_turn_during_50_000_changes(shop: Project) -> None:
    first = await listener(shop)
    await first.said("listening")
    workers = [await shop.worker() for _ in range(2)]
    second = await listener(shop)
    for worker in workers:
        await during(shop, 10_000, replace_worker(shop, worker))
    await during(shop, 10_000, replace_listener(shop, first, second))
    third = await listener(shop)
    await during(shop, 10_000, replace_listener(shop, second, third))
    await write(shop, 10_000)
    await settled(shop, 50_000)


async def newer(shop: Project, command: str, said: str) -> Process:
    started = await shop.start(sys.executable, "-m", "tests.e2e.newer", command, name=f"newer {command}")
    await started.said(said)
    return started


@pytest.mark.slow
async def test_an_older_version_beside_a_newer_one_waits_with_what_it_cannot_read(shop: Project) -> None:
    old_listener = await listener(shop)
    await old_listener.said("listening")
    old = await shop.worker(WORKER_HEALTH_PORT="0")
    await write(shop, 2_000)
    await settled(shop, 2_000)
    new_listener = await newer(shop, "listen", "standing by")
    assert await old_listener.terminate() == 0
    await new_listener.said("listening")
    await write(shop, 2_000)
    said = await old.said("waiting for an upgrade")
    ready = await shop.get(old, "/readyz")
    assert (ready.status_code, "upgrade this process" in str(ready.json()["reasons"])) == (503, True)
    assert (await shop.get(old, "/livez")).status_code == 200
    assert "of format 'e2'" in said["reason"]
    assert await shop.db.fetchval("select count(*) from derived_log") == 2_000
    # Both beside each other: the old one leaves to the new one what it cannot read.
    await newer(shop, "work", "working")
    await write(shop, 2_000)
    await settled(shop, 6_000)
    assert await old.terminate() == 0
    await write(shop, 2_000)
    await settled(shop, 8_000)
