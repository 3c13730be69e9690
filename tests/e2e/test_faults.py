"""Faults while changes flow: what is lost is inside a recorded gap, and nothing is doubled or out of order.

Derived data is right in the end whatever was lost. Servers that are killed here belong to one test alone.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import asyncpg
import pytest
from redis.asyncio import Redis

from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer, logged
from tests.stack import Process, Project, Servers, project

HEALED_SECONDS = 60.0


class Commit(NamedTuple):
    """A change of an order, and between which moments it was committed."""

    order: int
    change: tuple[str, int]
    after: datetime
    before: datetime


class Chronicler(Writer):
    """A writer that notes when it committed, and goes on when Postgres comes back."""

    def __init__(self, shop: Project, seed: int) -> None:
        super().__init__(shop, seed, keys=60)
        self._shop = shop
        self.commits: list[Commit] = []
        self._stopped = asyncio.Event()

    async def until_stopped(self) -> None:
        """Commit until `stop` is called."""
        while not self._stopped.is_set():
            db = await self._connection()
            try:
                while not self._stopped.is_set():
                    await self._noted(db)
                    await asyncio.sleep(0.005)
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                await self._recover()
            finally:
                db.terminate()

    def stop(self) -> None:
        """Write no more."""
        self._stopped.set()

    async def past(self, number: int) -> None:
        """Wait until so many more have been committed."""
        goal = self.committed + number
        while self.committed < goal:
            await asyncio.sleep(0.005)

    async def _connection(self) -> asyncpg.Connection:
        while True:
            try:
                return await asyncpg.connect(self._shop.database_url)
            except (asyncpg.PostgresError, OSError):
                await asyncio.sleep(0.02)

    async def _noted(self, db: asyncpg.Connection) -> None:
        after, known = datetime.now(UTC), {order: len(past) for order, past in self.history.items()}
        await self._one(db)
        for order, past in self.history.items():
            for change in past[known.get(order, 0) :]:
                self.commits.append(Commit(order, change, after, datetime.now(UTC)))

    async def _recover(self) -> None:
        """Find out what became of the change under way: it was committed, or it was not."""
        after = datetime.now(UTC) - timedelta(seconds=5)
        db = await self._connection()
        try:
            now = dict(await db.fetch("select id, version from orders"))
        finally:
            await db.close()
        for order in set(now) | set(self._alive):
            version, known = now.get(order), self._alive.get(order)
            if version == known:
                continue
            if version is None and known is not None:
                change = ("DELETE", self._alive.pop(order))
                self.history[order].append(change)
                self.committed += 1
            elif version is not None:
                change = ("INSERT" if known is None else "UPDATE", version)
                self._note(order, *change)
            self.commits.append(Commit(order, change, after, datetime.now(UTC)))


def writing(shop: Project, seed: int) -> tuple[Chronicler, "asyncio.Task[None]"]:
    writer = Chronicler(shop, seed)
    return writer, asyncio.create_task(writer.until_stopped(), name="test: writer")


async def settled(shop: Project, writer: Chronicler, listener: Process) -> None:
    """See that a last change arrives, that derived data is right, and that the log has no fault but gaps."""
    await shop.db.execute("insert into orders (id, customer_id, version) values (1000000, 1, 1)")
    await shop.until("select count(*) from derived_log where order_id = 1000000", 1, HEALED_SECONDS)
    # All that came before it is in the lanes by now; lanes do not wait for each other.
    deadline = time.monotonic() + HEALED_SECONDS
    while any(
        handler["queued"] or handler["held"]
        for handler in (await shop.get(listener, "/status")).json()["handlers"].values()
    ):
        assert time.monotonic() < deadline, (await shop.get(listener, "/status")).text
        await asyncio.sleep(0.05)
    await shop.until("select count(*) from tailrace.backfills where state <> 'done'", 0, HEALED_SECONDS)
    await shop.until(DIFFERENCES, 0, HEALED_SECONDS)
    await accounted(shop, writer)


async def accounted(shop: Project, writer: Chronicler) -> None:
    """See that each order's log is its history, but for changes within a recorded gap."""
    log = await logged(shop.db)
    log.pop(1_000_000, None)
    gaps = await shop.db.fetch("select since, until, cause from tailrace.gaps")
    lost = []
    for order, history in writer.history.items():
        seen = log.get(order, [])
        assert len(set(seen)) == len(seen), f"doubled: {order}"
        kept = set(seen)
        assert seen == [change for change in history if change in kept], f"out of order: {order}"
        lost += [(order, change) for change in history if change not in kept]
    assert set(log) <= set(writer.history)
    moments = {(commit.order, commit.change): commit for commit in writer.commits}
    assert len(moments) == writer.committed
    for key in lost:
        commit = moments[key]
        assert any(
            (gap["since"] is None or gap["since"] <= commit.before) and gap["until"] >= commit.after
            for gap in gaps
        ), f"{commit}\n" + "\n".join(str(gap) for gap in gaps)


async def gap(shop: Project, cause: str, number: int = 1) -> None:
    await shop.until(
        f"select count(*) >= {number} from tailrace.gaps where cause like '%{cause}%'",
        value=True,
        seconds=HEALED_SECONDS,
    )


async def alive(*processes: Process) -> None:
    for process in processes:
        assert process.process.returncode is None, process.lines[-5:]
        assert "Traceback" not in process.text, process.text


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    """A shop on servers that nobody kills."""
    async with project(shared, handlers.TABLES, "tests.e2e.shop") as made:
        yield made


async def started(shop: Project) -> tuple[Process, Process]:
    return await asyncio.gather(shop.listener(), shop.worker())


# Redis


@pytest.mark.slow
async def test_redis_flushed_killed_and_away_for_long(breakable: Project) -> None:
    shop, redis = breakable, breakable.servers.redis
    listener, worker = await started(shop)
    writer, task = writing(shop, 1)
    await writer.past(100)
    client: Redis = Redis.from_url(redis.url)
    await client.flushall()
    await client.aclose()
    await gap(shop, "Redis")
    await writer.past(100)
    await redis.restart()
    await gap(shop, "Redis", 2)
    await writer.past(100)
    await redis.kill()
    away = time.monotonic() + 20
    while time.monotonic() < away:  # nothing tells that a server has been away for long enough but time
        await writer.past(20)
    await redis.start()
    await gap(shop, "Redis", 3)
    await writer.past(100)
    writer.stop()
    await task
    await settled(shop, writer, listener)
    await alive(listener, worker)
    assert await worker.terminate() == 0
    assert await listener.terminate() == 0


# Postgres


@pytest.mark.slow
async def test_postgres_restarts_under_load(breakable: Project) -> None:
    shop = breakable
    listener, worker = await started(shop)
    writer, task = writing(shop, 2)
    await writer.past(100)
    await shop.servers.postgres.restart(immediate=True)
    shop.db = await asyncpg.connect(shop.database_url)
    await gap(shop, "temporary slot")
    await writer.past(100)
    writer.stop()
    await task
    await settled(shop, writer, listener)
    await alive(listener, worker)


# The listener


@pytest.mark.slow
async def test_a_listener_killed_under_load(shop: Project) -> None:
    listener, worker = await started(shop)
    writer, task = writing(shop, 3)
    await writer.past(100)
    await listener.kill()
    listener = await shop.listener()
    await gap(shop, "the listener was not running")
    await writer.past(50)
    writer.stop()
    await task
    await settled(shop, writer, listener)
    await alive(listener, worker)


# Realtime


@pytest.mark.slow
async def test_realtime_drops_closes_expires_and_refuses(shop: Project) -> None:
    listener, worker = await started(shop)
    faults = shop.standin.faults
    writer, task = writing(shop, 4)
    await writer.past(50)

    faults.drop_next = 300
    await shop.standin.counters.reach("dropped", 300)
    await gap(shop, "Realtime dropped changes")

    await shop.standin.drop_connections(1012)
    await gap(shop, "1012")

    shop.standin.expire_tokens()
    await gap(shop, "Token has expired")

    faults.error_events = 401
    await gap(shop, "Error 401")
    faults.error_events = None

    faults.refuse_joins = True
    await shop.standin.drop_connections(1006)
    await listener.said("cannot subscribe, trying on")
    faults.refuse_joins = False
    await gap(shop, "1006")

    await writer.past(50)
    writer.stop()
    await task
    await settled(shop, writer, listener)
    await alive(listener, worker)


async def replaced(shop: Project, fault: str) -> None:
    listener, worker = await started(shop)
    writer, task = writing(shop, 5)
    await writer.past(50)
    begun = datetime.now(UTC)
    setattr(shop.standin.faults, fault, "current")
    await gap(shop, "")
    ended = await shop.db.fetchval("select max(until) from tailrace.gaps")
    # Fixed by the design: a socket that carries nothing is replaced in under 30 s.
    assert ended - begun < timedelta(seconds=30)
    await writer.past(50)
    writer.stop()
    await task
    await settled(shop, writer, listener)
    await alive(listener, worker)


@pytest.mark.slow
async def test_realtime_that_says_nothing_is_replaced(shop: Project, shared: Servers) -> None:
    async with project(shared, handlers.TABLES, "tests.e2e.shop") as another, asyncio.TaskGroup() as group:
        # Both wait nearly all the time, so they wait together.
        group.create_task(replaced(shop, "silent"), name="test: silent")
        group.create_task(replaced(another, "half_open"), name="test: half open")


async def test_what_realtime_repeats_is_given_twice(shop: Project) -> None:
    """Realtime has never been seen to repeat a frame, and its frames carry nothing to tell a repetition by.

    In plain delivery a repeated frame is a change of its own: a change handler is given it twice, in its
    place, while what derive handlers make is right all the same.
    """
    listener, worker = await started(shop)
    shop.standin.faults.duplicate = 1.0
    for version in range(1, 4):
        await shop.db.execute(
            "insert into orders (id, customer_id, version) values (1, 1, $1)"
            " on conflict (id) do update set version = excluded.version",
            version,
        )
    await shop.until("select count(*) from derived_log", 6)
    await shop.until(DIFFERENCES, 0)
    assert await logged(shop.db) == {
        1: [("INSERT", 1)] * 2 + [("UPDATE", 2)] * 2 + [("UPDATE", 3)] * 2,
    }
    await alive(listener, worker)
