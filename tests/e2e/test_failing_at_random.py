"""Order by key while changes fail, are retried and redriven, and processes are killed, all by a seed.

TEST_SEEDS=50 tries as many of them.
"""

import asyncio
import json
import os
import random
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.faults import Kept
from tests.e2e import random_handlers
from tests.e2e.test_proven import drop_slot
from tests.stack import Project, Servers, project
from worker.asked import Operator, Which
from worker.database import make_engine
from worker.operating import Operations

SETTINGS = {
    "WORKER_DELIVERY": "proven",
    "WORKER_MAX_ATTEMPTS": "3",
    "WORKER_BACKOFF_SECONDS": "0.05",
    "WORKER_LANES": "4",
}
HANDLERS = ("goes_on", "halts")
CUSTOMERS = 12
STEPS = 6
SEEDS = int(os.environ.get("TEST_SEEDS", "1"))
APPLIED = "select count(*)::int from derived_log"


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    async with project(shared, random_handlers.TABLES, "tests.e2e.random_handlers", **SETTINGS) as made:
        yield made
        await drop_slot(made)


class World:
    """A writer, people who redrive, and somebody who kills."""

    def __init__(self, shop: Project, seed: int) -> None:
        self.shop = shop
        self.random = random.Random(seed)
        self.committed = 0
        self.orders = 0

    async def write(self) -> None:
        """Commit some transactions: new orders, and some that change hands."""
        for _ in range(self.random.randrange(5, 15)):
            async with self.shop.db.transaction():
                for _n in range(self.random.choice((1, 1, 3, 20))):
                    await self._change()

    async def _change(self) -> None:
        customer = self.random.randrange(CUSTOMERS)
        # Most are well; of the others some succeed in time, and some never do.
        fails = self.random.choices((0, 1, 2, 99), (88, 4, 4, 4))[0]
        if self.orders and self.random.random() < 0.1:
            order = self.random.randrange(self.orders)
            statement = "update orders set customer_id = $2, fails = $3 where id = $1"
        else:
            order, self.orders = self.orders, self.orders + 1
            statement = "insert into orders (id, customer_id, fails) values ($1, $2, $3)"
        await self.shop.db.execute(statement, order, customer, fails)
        self.committed += 1

    async def some_are_applied(self) -> None:
        """Wait until something has happened, so that what comes next comes in the midst of it."""
        before = await self.shop.db.fetchval(APPLIED)
        open_ = 2 * self.committed - before
        goal = before + self.random.randrange(1, max(2, open_ // 3))
        try:
            await self.shop.until(f"select count(*) >= {goal} from derived_log", value=True, seconds=3)
        except AssertionError:
            return  # all that is left waits for a person

    async def redrive(self, desk: Operations) -> None:
        """Have some dead letters tried again, although nothing is mended."""
        dead = await desk.find(Which())
        for one in self.random.sample(dead, min(len(dead), 3)):
            await desk.redrive(Operator("anna", "command"), one["id"])


@asynccontextmanager
async def kept(shop: Project) -> AsyncIterator[tuple[Kept, list[Kept]]]:
    """Keep a listener and two workers alive."""
    listener, workers = Kept(shop, "listener"), [Kept(shop, "worker") for _ in range(2)]
    async with asyncio.TaskGroup() as group:
        for one in (listener, *workers):
            group.create_task(one.run(), name=f"test: {one.role}")
        try:
            await (await listener.up()).said("listening")
            yield listener, workers
        finally:
            for one in (listener, *workers):
                await one.stop()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", range(SEEDS))
async def test_the_order_of_each_key_holds_whatever_fails_is_redriven_or_killed(
    shop: Project, seed: int
) -> None:
    world = World(shop, seed)
    engine = make_engine(shop.database_url, name="test operator", size=1)

    async def wake(_: object) -> None: ...

    try:
        desk = Operations(engine, list, wake)
        async with kept(shop) as (listener, workers):
            for _ in range(STEPS):
                await world.write()
                await world.some_are_applied()
                match world.random.choice(("worker", "worker", "listener", "redrive", "redrive")):
                    case "worker":
                        await world.random.choice(workers).kill()
                    case "listener":
                        await listener.kill()
                    case "redrive":
                        await world.redrive(desk)
            await world.write()
            await shop.db.execute("insert into derived_mended default values")
            await everything_applied(shop, world.committed)
            deaths = [line for one in (listener, *workers) for line in one.died]
        assert not deaths
    finally:
        await engine.dispose()
    await each_once_and_in_order(shop, world.committed)


async def everything_applied(shop: Project, committed: int) -> None:
    """Redrive what is dead, by the command, once everything has been read; wait until all is applied."""
    await shop.until(f"select sum(read)::int = {2 * committed} from tailrace.lanes", value=True, seconds=90)
    # What waits behind a dead letter that halts may die in its turn until all is mended: then no more.
    code, output = await shop.run("dead-letters", "redrive", "--all", "--json")
    assert code == 0, output
    assert {one["status"] for one in json.loads(output)} <= {"retrying"}
    await shop.until(APPLIED, 2 * committed, seconds=90)
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0


async def each_once_and_in_order(shop: Project, committed: int) -> None:
    """Look at what the handlers were given: by its own order, each key's changes rise."""
    for handler in HANDLERS:
        rows = await shop.db.fetch(
            "select lsn, ordinal, customers, source from derived_log where handler = $1 order by seq", handler
        )
        places = [(row["lsn"], row["ordinal"]) for row in rows]
        assert len(places) == len(set(places)) == committed
        of_key: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for row, place in zip(rows, places, strict=True):
            # What goes on after a dead letter is before it, if a person brings that back; what halts waits.
            if handler == "halts" or row["source"] != "redrive":
                for customer in row["customers"]:
                    of_key[customer].append(place)
        for customer, seen in of_key.items():
            assert seen == sorted(seen), (handler, customer)
    assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
