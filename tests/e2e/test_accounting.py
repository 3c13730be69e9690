"""Every change is accounted for at any moment, and `status --verify` finds what is not."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.e2e import counting_handlers
from tests.e2e import shop as handlers
from tests.e2e.test_proven import drop_slot, ready, settled
from tests.e2e.writing import Writer
from tests.stack import Project, Servers, project

PARTS = ("filtered", "applied", "held", "parked", "dead", "queued")


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    environment = {"WORKER_DELIVERY": "proven", "WORKER_LANES": "4", "WORKER_LANE_BACKLOG": "200"}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **environment) as made:
        yield made
        await drop_slot(made)


async def status(shop: Project, *options: str) -> tuple[int, dict[str, Any]]:
    code, output = await shop.run("status", "--json", *options)
    return code, json.loads(output[output.index("{") :])


async def recounted(shop: Project) -> dict[str, Any]:
    """Verify; whatever goes on, all must be accounted for."""
    code, told = await status(shop, "--verify")
    found = told["verification"]
    assert (code, found["problems"], found["ok"]) == (0, [], True)
    for name, counts in told["handlers"].items():
        assert counts["read"] == sum(counts[part] for part in PARTS), name
    return told


async def some_entry(shop: Project, redis: Redis) -> tuple[str, list[Any]]:
    """Find a lane of the change handler with several entries: its stream, and what it holds."""
    ours = f"{shop.environment['WORKER_QUEUE']}:*:lane:log:*"
    for key in sorted([key async for key in redis.scan_iter(ours)]):
        entries = await redis.xrange(key)
        if len(entries) > 5:
            return key.decode(), entries
    raise AssertionError("no lane has entries")


async def test_all_is_accounted_for_while_changes_arrive_and_when_they_are_applied(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    writer = Writer(shop, seed=31)
    async with asyncio.TaskGroup() as group:
        writing = group.create_task(writer.write(3_000), name="test: writing")
        # Ten times while it writes: counting without a pause would be most of what the machine does.
        for reached in range(0, 3_000, 300):
            while writer.committed < reached and not writing.done():
                await asyncio.sleep(0.01)
            await recounted(shop)
    await settled(shop, writer)
    told = await recounted(shop)
    assert told["handlers"]["log"]["applied"] == told["handlers"]["log"]["read"] == 3_000
    assert told["handlers"]["totals"]["applied"] == 3_000


async def test_a_backlog_is_counted_and_an_entry_that_vanished_is_named(shop: Project) -> None:
    await ready(shop)
    writer = Writer(shop, seed=32)
    await writer.write(300)
    redis = Redis.from_url(shop.servers.redis.url)
    try:
        while (told := await recounted(shop))["verification"]["handlers"]["log"]["queued"] < 300:
            pass
        assert told["verification"]["log"]["changes"] >= 300
        await shop.processes[0].kill()  # a listener that reads again for whatever reason would mend it
        key, entries = await some_entry(shop, redis)
        await redis.xdel(key, entries[2][0])
        code, told = await status(shop, "--verify")
        found = told["verification"]
        assert (code, found["ok"], found["handlers"]["log"]["missing"]) == (1, False, 1)
        assert any("has a hole" in problem for problem in found["problems"])
        # The worker finds the hole, and the listener reads again.
        await ready(shop)
        await shop.worker()
        await settled(shop, writer)
        await recounted(shop)
    finally:
        await redis.aclose()


async def test_a_truncate_and_a_payload_that_vanished_are_named(shop: Project) -> None:
    await ready(shop)
    writer = Writer(shop, seed=36)
    await writer.write(20)
    await shop.db.execute(
        "insert into orders (id, customer_id, status) values (1000, 1, repeat('x', 2000000)); truncate orders"
    )
    redis = Redis.from_url(shop.servers.redis.url)
    try:
        # A TRUNCATE counts once for the handler that follows it, whichever lanes have it.
        while (await recounted(shop))["verification"]["handlers"]["totals"]["queued"] < 22:
            pass
        await shop.processes[0].kill()
        assert await shop.db.fetchval("select count(*) from tailrace.payloads") == 1
        payload = await shop.db.fetchrow("delete from tailrace.payloads returning *")
        code, told = await status(shop, "--verify")
        assert (code, told["verification"]["ok"]) == (1, False)
        assert any("tailrace.payloads" in problem for problem in told["verification"]["problems"])
        await shop.db.execute("insert into tailrace.payloads values ($1, $2, $3, $4, $5, $6)", *payload)
        # The last entry of a lane: no other entry names it.
        ours = f"{shop.environment['WORKER_QUEUE']}:*:lane:totals:*"
        keys = sorted([key async for key in redis.scan_iter(ours)])
        assert len(keys) == 4
        (last,) = await redis.xrevrange(keys[0], count=1)
        await redis.xdel(keys[0], last[0])
        code, told = await status(shop, "--verify")
        found = told["verification"]
        assert (code, found["handlers"]["totals"]["missing"]) == (1, 1)
    finally:
        await redis.aclose()


async def test_an_entry_that_is_not_in_the_log_is_named(shop: Project) -> None:
    await ready(shop)
    writer = Writer(shop, seed=33)
    await writer.write(200)
    redis = Redis.from_url(shop.servers.redis.url)
    try:
        while (await recounted(shop))["verification"]["handlers"]["log"]["queued"] < 200:
            pass
        await shop.processes[0].kill()
        key, entries = await some_entry(shop, redis)
        milliseconds, number = entries[-1][0].decode().split("-")
        await redis.xadd(key, entries[-1][1], id=f"{milliseconds}-{int(number) + 1}")
        code, told = await status(shop, "--verify")
        assert (code, told["verification"]["handlers"]["log"]["phantom"]) == (1, 1)
    finally:
        await redis.aclose()


async def test_lanes_that_lag_are_parked_and_reading_goes_on(shop: Project) -> None:
    await ready(shop)
    writer = Writer(shop, seed=34)
    await writer.write(2_500)
    worker = await shop.worker(wait=False)
    await worker.said("lane is parked")
    await settled(shop, writer)
    await recounted(shop)


async def test_a_paused_handler_holds_up_no_other(shop: Project) -> None:
    await ready(shop)
    await shop.db.execute("update tailrace.handlers set paused = true where name = 'log'")
    await shop.worker()
    writer = Writer(shop, seed=35)
    await writer.write(1_500)
    await shop.until("select sum(applied)::int from tailrace.lanes where handler = 'totals'", 1_500)
    await shop.until(
        "select coalesce(sum(changes), 0)::int from tailrace.held where status = 'parked'", 1_500
    )
    told = await recounted(shop)
    assert (told["handlers"]["log"]["parked"], told["handlers"]["log"]["paused"]) == (1_500, True)
    await shop.db.execute("update tailrace.handlers set paused = false")
    await settled(shop, writer)
    await recounted(shop)


@pytest.fixture
async def counting(shared: Servers) -> AsyncIterator[Project]:
    environment = {"WORKER_DELIVERY": "proven", "WORKER_LANES": "4"}
    tables, module = counting_handlers.TABLES, "tests.e2e.counting_handlers"
    async with project(shared, tables, module, **environment) as made:
        yield made
        await drop_slot(made)


async def test_what_is_read_a_second_time_is_counted_once(counting: Project) -> None:
    await ready(counting)
    await counting.worker()
    insert = (
        "insert into orders select n, case when n % 2 = 0 then 'paid' else 'new' end"
        " from generate_series($1::int, $2::int) n"
    )
    noted = "(select filtered from tailrace.handlers where name = 'paid')"
    applied = "(select sum(applied)::int from tailrace.lanes where handler = '{}')"
    # A lane that stands still holds the slot back: all that comes after its first entry is read again.
    other = await asyncpg.connect(counting.database_url)
    try:
        async with other.transaction():
            await other.execute("select from tailrace.lanes where (handler, lane) = ('all', 0) for update")
            for first in range(1, 300, 3):  # in commits of their own
                await counting.db.execute(insert, first, first + 2)
            await counting.until(f"select ({applied.format('paid')}, {noted})", (150, 150))
            assert 0 < await counting.db.fetchval(f"select {applied.format('all')}") < 300
            await counting.processes[0].kill()
            await ready(counting)
            await counting.db.execute(insert, 301, 302)
            # What is read again is noted before what comes after it, if it is noted at all.
            await counting.until(f"select {noted} > 150", value=True)
    finally:
        await other.close()
    await counting.until(f"select {applied.format('all')}", 302)
    await counting.until(f"select {applied.format('paid')}", 151)
    assert await counting.db.fetchval(f"select {noted}") == 151
    told = await recounted(counting)
    assert {
        name: (told["handlers"][name]["read"], told["handlers"][name]["filtered"]) for name in ("all", "paid")
    } == {
        "all": (302, 0),
        "paid": (302, 151),
    }
    rows = await counting.db.fetch(
        "select handler, count(*), count(distinct id) from derived_log group by 1 order by 1"
    )
    assert [tuple(row) for row in rows] == [("all", 302, 302), ("paid", 151, 151)]
