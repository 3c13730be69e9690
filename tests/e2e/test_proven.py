"""Proven delivery end to end: nothing lost, nothing applied twice, no gap, whatever dies."""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer, logged
from tests.stack import Project, Servers, project, servers

PROVEN = {"WORKER_DELIVERY": "proven"}


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **PROVEN) as made:
        yield made
        await drop_slot(made)


@pytest.fixture
async def breakable(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    async with (
        servers(tmp_path_factory.mktemp("breakable")) as own,
        project(own, handlers.TABLES, "tests.e2e.shop", **PROVEN) as made,
    ):
        yield made
        await drop_slot(made)


async def drop_slot(shop: Project) -> None:
    for process in shop.processes:
        await process.kill()
    await shop.until("select count(*) from pg_replication_slots where slot_name = 'tailrace' and active", 0)
    await shop.db.execute(
        "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
        " where slot_name = 'tailrace' and database = current_database()"
    )


async def settled(shop: Project, writer: Writer, seconds: float = 90) -> None:
    await shop.until("select count(*) from derived_log", writer.committed, seconds)
    await shop.until(DIFFERENCES, 0, seconds)
    assert await logged(shop.db) == writer.history
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0


async def ready(shop: Project) -> None:
    process = await shop.listener(wait=False)
    await process.said("listening")


async def test_ten_thousand_commits_are_applied_once_and_in_order(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    writer = Writer(shop, seed=11)
    await writer.write(10_000)
    await settled(shop, writer)


async def test_nothing_is_missed_while_the_listener_is_away(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    writer = Writer(shop, seed=12)
    await writer.write(200)
    await settled(shop, writer)
    await shop.processes[0].kill()
    await writer.write(500)
    await ready(shop)
    await writer.write(200)
    await settled(shop, writer)


async def test_without_realtime_everything_still_arrives(shop: Project) -> None:
    shop.standin.faults.refuse_connections = True
    await ready(shop)
    await shop.worker()
    writer = Writer(shop, seed=13)
    await writer.write(500)
    await settled(shop, writer)


async def test_flushed_lanes_are_filled_again_from_the_slot(breakable: Project) -> None:
    await ready(breakable)
    await breakable.worker()
    writer = Writer(breakable, seed=14)
    writing = asyncio.create_task(writer.write(6_000), name="test: writer")
    client = Redis.from_url(breakable.servers.redis.url)
    chance = random.Random(14)
    for goal in sorted(chance.randrange(200, 5_000) for _ in range(4)):
        await breakable.until(f"select count(*) >= {goal} from derived_log", value=True)
        await client.flushall()
    await client.aclose()
    await writing
    await settled(breakable, writer)


async def test_listeners_and_workers_killed_at_random_under_load(shop: Project) -> None:
    chance = random.Random(15)
    await ready(shop)
    listener = shop.processes[-1]
    worker = await shop.worker()
    writer = Writer(shop, seed=15)
    writing = asyncio.create_task(writer.write(8_000), name="test: writer")
    for goal in sorted(chance.randrange(100, 7_000) for _ in range(6)):
        await shop.until(f"select count(*) >= {goal} from derived_log", value=True)
        if chance.random() < 0.5:
            await listener.kill()
            await ready(shop)
            listener = shop.processes[-1]
        else:
            await worker.kill()
            worker = await shop.worker()
    await writing
    await settled(shop, writer)


async def test_postgres_restarted_in_the_middle(breakable: Project) -> None:
    await ready(breakable)
    await breakable.worker()
    writer = Writer(breakable, seed=16)
    await writer.write(800)
    await breakable.servers.postgres.restart(immediate=True)
    await breakable.reconnect()
    await writer.write(800)
    await settled(breakable, writer)


async def test_the_slot_moves_on(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    slot = "from pg_replication_slots where slot_name = 'tailrace'"
    before = await shop.db.fetchval(f"select confirmed_flush_lsn::text {slot}")
    writer = Writer(shop, seed=17)
    await writer.write(300)
    await settled(shop, writer)
    await shop.until(f"select confirmed_flush_lsn > '{before}' {slot}", value=True)


async def test_deliveries_can_be_changed_and_leave_gaps_behind_but_no_slot(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    await shop.db.execute("insert into orders (id, customer_id, amount) values (1, 1, 10)")
    await shop.until("select count(*) from derived_log", 1)
    assert await shop.processes[0].terminate() == 0
    plain = await shop.listener(WORKER_DELIVERY="plain")
    slots = "select count(*) from pg_replication_slots where slot_name = 'tailrace'"
    assert await shop.db.fetchval(slots) == 0
    await shop.db.execute("insert into orders (id, customer_id, amount) values (2, 1, 10)")
    await shop.until("select count(*) from derived_log", 2)
    assert await plain.terminate() == 0
    await ready(shop)
    await shop.db.execute("insert into orders (id, customer_id, amount) values (3, 1, 10)")
    await shop.until("select count(*) from derived_log", 3)
    await shop.until(DIFFERENCES, 0)
    causes = await shop.db.fetch("select cause from tailrace.gaps order by id")
    assert "the delivery was changed from proven to plain" in {row[0] for row in causes}
    assert "the delivery was changed from plain to proven" in {row[0] for row in causes}
