"""A server that is away uses up no attempt and makes no dead letter, whatever was under way.

TEST_OUTAGE_SECONDS=60 has it away for as long.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from tests.e2e import outage_handlers
from tests.e2e.test_proven import drop_slot, ready
from tests.stack import Project, project, servers

SECONDS = float(os.environ.get("TEST_OUTAGE_SECONDS", "3"))
ORDERS = 300
CUSTOMERS = 30
# A second attempt would be the last one: whoever uses one up is seen in `attempt`, or in a dead letter.
SETTINGS = {
    "WORKER_DELIVERY": "proven",
    "WORKER_LANES": "4",
    "WORKER_MAX_ATTEMPTS": "2",
    "WORKER_BACKOFF_SECONDS": "0.05",
}


@pytest.fixture
async def shop(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    async with (
        servers(tmp_path_factory.mktemp("outage")) as own,
        project(own, outage_handlers.TABLES, "tests.e2e.outage_handlers", **SETTINGS) as made,
    ):
        yield made
        await drop_slot(made)


async def write(shop: Project, first: int) -> None:
    for id_ in range(first, first + ORDERS):
        slow = id_ % 50 == 10  # in each lane somebody is at work for a while
        await shop.db.execute("insert into orders values ($1, $2, $3)", id_, id_ % CUSTOMERS, slow)


async def under_way(redis: Redis) -> None:
    """Wait until calls have begun that have not ended."""
    async with asyncio.timeout(30):
        while True:
            begun, done = (int(one or 0) for one in await redis.mget("outage:begun", "outage:done"))
            if begun > done:
                return
            await asyncio.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(120 + 3 * SECONDS)
@pytest.mark.parametrize("server", ["postgres", "redis"])
async def test_a_server_that_is_away_uses_up_no_attempt(shop: Project, server: str) -> None:
    await ready(shop)
    worker = await shop.worker()
    await write(shop, 0)
    redis: Redis = Redis.from_url(shop.servers.redis.url)
    await under_way(redis)
    await redis.aclose()
    away = shop.servers.postgres if server == "postgres" else shop.servers.redis
    await away.kill()
    await asyncio.sleep(SECONDS)  # nothing tells that a server has been away for long enough but time
    await away.start()
    if server == "postgres":
        await shop.reconnect()
    await write(shop, ORDERS)
    await shop.until("select count(*) from derived_log", 2 * ORDERS, 60)
    log = await shop.db.fetch("select order_id, customer_id, attempt from derived_log order by seq")
    of_customer: dict[int, list[int]] = defaultdict(list)
    for row in log:
        of_customer[row["customer_id"]].append(row["order_id"])
    assert all(seen == sorted(set(seen)) for seen in of_customer.values())
    assert {row["attempt"] for row in log} == {1}
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0
    assert not [line for line in worker.lines if line["message"] == "handler failed"]
    assert worker.process.returncode is None
