"""Workers, each on an address of its own, share the lanes by their load; some join, and some leave."""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis

from tests.e2e import rolling_handlers as handlers
from tests.e2e import skewed_handlers as skewed
from tests.e2e.rolling_handlers import WRONG
from tests.e2e.test_proven import drop_slot
from tests.e2e.test_rolling import write
from tests.stack import Process, Project, Servers, project

SECONDS = 30
"""A quiet machine needs less than ten; eight processes on two cores are slow."""


def common_port(addresses: list[str]) -> int:
    """Find a port that is free on all of these addresses."""
    with socket.create_server((addresses[0], 0)) as first:
        port = int(first.getsockname()[1])
        for address in addresses[1:]:
            socket.create_server((address, port)).close()
        return port


async def owners(shop: Project) -> Counter[int]:
    """Count the lanes of each worker, by its process id."""
    async with Redis.from_url(shop.servers.redis.url) as redis:
        claims = await redis.hgetall(f"{shop.environment['WORKER_QUEUE']}:claims")
    names = [claim.decode() for claim in claims.values()]
    return Counter(int(name.split("-")[-2]) for name in names if not name.startswith("queued:"))


async def shared_among(shop: Project, workers: list[Process]) -> float:
    """Wait until exactly these workers have lanes, each of them; returns how long that took."""
    began = time.monotonic()
    wanted = {worker.process.pid for worker in workers}
    while set(found := await owners(shop)) != wanted:
        assert time.monotonic() - began < SECONDS, (wanted, found)
        await asyncio.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(400)  # nine processes start
async def test_workers_that_join_are_given_lanes_and_those_that_leave_give_them_back(
    shared: Servers,
) -> None:
    addresses = [f"127.0.0.{number}" for number in range(11, 19)]
    port = common_port(addresses)
    async with project(
        shared,
        handlers.TABLES,
        "tests.e2e.sharing_handlers,tests.e2e.rolling_handlers",
        WORKER_DELIVERY="proven",
    ) as shop:
        await (await shop.listener(wait=False)).said("listening")

        async def start(address: str) -> Process:
            worker = await shop.worker(wait=False, HEALTH_HOST=address, WORKER_HEALTH_PORT=str(port))
            await worker.said("working", seconds=90)
            return worker

        workers = [await start(address) for address in addresses[:2]]
        written, stop = 0, asyncio.Event()

        async def busy() -> None:
            nonlocal written
            while not stop.is_set():
                await write(shop, 100)
                written += 100
                await asyncio.sleep(0.1)  # so that there is always something, and never too much

        writing = asyncio.create_task(busy(), name="test: writer")
        await shared_among(shop, workers)
        workers += await asyncio.gather(*(start(address) for address in addresses[2:]))
        await shared_among(shop, workers)
        async with httpx.AsyncClient() as client:
            for address in addresses:
                until = time.monotonic() + SECONDS
                # Not ready is also one whose sweep is late, as on a machine with too much to do.
                while (await client.get(f"http://{address}:{port}/readyz", timeout=10)).status_code != 200:
                    assert time.monotonic() < until, address
                    await asyncio.sleep(0.1)
        gone, workers = workers[:4], workers[4:]
        await gone[0].kill()
        codes = await asyncio.gather(*(worker.terminate() for worker in gone[1:]))
        assert codes == [0, 0, 0]
        await shared_among(shop, workers)
        stop.set()
        await writing
        await shop.until("select count(*) from derived_log", written, 90)
        assert await shop.db.fetchval(WRONG) == 0
        assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
        await drop_slot(shop)


LATEST = "select distinct on (order_id) pid from derived_log order by order_id, seq desc"


async def appliers(shop: Project) -> Counter[int]:
    """Count the orders by the worker that was the last to apply a change of them."""
    return Counter(row["pid"] for row in await shop.db.fetch(LATEST))


async def appliers_become(shop: Project, wanted: Callable[[Counter[int]], bool], what: str) -> None:
    """Wait until the changes are applied by whom they should be."""
    until = time.monotonic() + SECONDS
    while not wanted(found := await appliers(shop)):
        assert time.monotonic() < until, f"{what}: {found}"
        await asyncio.sleep(0.1)  # a handler's commits send no signal


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_worker_with_little_to_do_is_handed_lanes_that_go_to_nobody_by_themselves(
    shared: Servers,
) -> None:
    async with project(
        shared, skewed.TABLES, "tests.e2e.skewed_handlers", WORKER_LANES=str(skewed.LANES)
    ) as shop:
        await shop.listener()
        first = await shop.worker()
        stop = asyncio.Event()

        async def trickle() -> None:
            db, rounds = await asyncpg.connect(shop.database_url), 0
            try:
                while not stop.is_set():
                    await db.execute(
                        "insert into orders select n, 1 from generate_series(1, $1::int) n"
                        " on conflict (id) do update set version = orders.version + 1",
                        skewed.ORDERS,
                    )
                    rounds += 1
                    # A lane that has more to do is dealt anew after seconds, and one that is idle for
                    # seconds is given back: here none is ever either.
                    while await db.fetchval("select count(*) from derived_log") < rounds * skewed.ORDERS:
                        await asyncio.sleep(0.02)
                    await asyncio.sleep(0.1)
            finally:
                await db.close()

        writing = asyncio.create_task(trickle(), name="test: writer")
        one = first.process.pid
        await appliers_become(shop, lambda found: found == {one: skewed.ORDERS}, "alone")
        second = await shop.worker()
        other = second.process.pid
        some = range(3, skewed.ORDERS - 2)
        await appliers_become(
            shop, lambda found: found.keys() == {one, other} and found[other] in some, "joined"
        )
        assert await first.terminate() == 0
        await appliers_become(shop, lambda found: found == {other: skewed.ORDERS}, "left")
        stop.set()
        await writing
        assert await shop.db.fetchval(WRONG) == 0
