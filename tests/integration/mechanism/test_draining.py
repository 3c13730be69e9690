"""Who drains what, and when: claims, bells, the sweep, the end."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Handlers
from worker.lanes import Lane, Lanes
from worker.queue import connection_pool

DEADLINE_SECONDS = 20.0


class Sums:
    """A derive handler that tells which keys it was given."""

    def __init__(self) -> None:
        self.on = Handlers()
        self.keys: list[int] = []
        self.hold: asyncio.Event | None = None
        self._news = asyncio.Condition()

        @self.on.derive("items", by="grp", name="sums")
        async def sums(keys: list[int], _: AsyncSession) -> None:
            async with self._news:
                self.keys += keys
                self._news.notify_all()
            if self.hold is not None:
                await self.hold.wait()

    async def computed(self, times: int) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS), self._news:
            await self._news.wait_for(lambda: len(self.keys) >= times)


@pytest.fixture
def sums() -> Sums:
    return Sums()


@asynccontextmanager
async def running(*works: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) or one is None for one in results), results


async def owner(at: Bench, lane: Lane) -> str | None:
    found = await at.lanes.raw("HGET", at.lanes.claims, str(lane))
    return None if found is None else found.decode()


async def test_a_lost_wake_up_is_found_by_the_sweep(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    await at.put("items", item(1, 7))
    lane = at.lane_of("sums", item(1, 7))
    assert at.enqueued == [lane]
    at.enqueued.clear()
    await at.redis.delete(at.lanes.claims)  # and with it arq's job
    worker = at.worker("w")
    await worker._sweep_once()
    assert at.enqueued == [lane]
    job = asyncio.create_task(worker.drain(lane))
    await sums.computed(1)
    await worker.stop(DEADLINE_SECONDS)
    await job
    assert sums.keys == [7]
    assert await owner(at, lane) is None


async def test_what_comes_while_a_job_lingers_needs_no_new_job(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    worker, lane = at.worker("w"), at.lane_of("sums", item(1, 7))
    await at.lanes.alive("w")
    async with running(worker.listen(), worker.drain(lane)):
        for times in range(1, 6):
            await at.put("items", item(times, 7))
            await sums.computed(times)
        assert at.enqueued in ([], [lane])  # one at most, from before the claim
        await worker.stop(DEADLINE_SECONDS)


async def test_what_a_bell_has_told_is_not_read_from_redis(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    worker, lane = at.worker("w"), at.lane_of("sums", item(1, 7))
    await at.lanes.alive("w")
    async with running(worker.listen(), worker.drain(lane)):
        await at.put("items", item(1, 7))
        await sums.computed(1)
        before = await reads_of_streams(at)
        for times in range(2, 6):
            await at.put("items", item(times, 7))
            await sums.computed(times)
        assert await reads_of_streams(at) - before <= 1  # the first may have been under way
        await worker.stop(DEADLINE_SECONDS)
    assert await at.counters() == (5, 0, 0)  # with nothing left to be trimmed


async def reads_of_streams(at: Bench) -> int:
    return int((await at.redis.info("commandstats")).get("cmdstat_xrange", {"calls": 0})["calls"])


async def test_a_living_workers_lane_is_left_alone_and_a_dead_ones_is_taken(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    lane = at.lane_of("sums", item(1, 7))
    await at.lanes.alive("other")
    await at.lanes.claim(lane, "other")
    await at.put("items", item(1, 7))
    assert at.enqueued == []  # it was rung
    worker = at.worker("w")
    await worker.drain(lane)
    assert sums.keys == []
    await at.lanes.gone("other")
    await worker._sweep_once()
    assert at.enqueued == [lane]
    async with running(worker.drain(lane)):
        await sums.computed(1)
        await worker.stop(DEADLINE_SECONDS)


async def test_stopping_waits_for_the_pass_under_way_and_gives_lanes_back(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    sums.hold = asyncio.Event()
    await at.put("items", item(1, 7))
    lane = at.lane_of("sums", item(1, 7))
    worker = at.worker("w")
    job = asyncio.create_task(worker.drain(lane))
    await sums.computed(1)
    stop = asyncio.create_task(worker.stop(DEADLINE_SECONDS))
    await asyncio.sleep(0)
    assert not stop.done()
    sums.hold.set()
    await asyncio.gather(stop, job)
    assert (await at.counters())[0] == 1
    assert await owner(at, lane) is None
    await worker.drain(lane)  # a job that comes late is left to others
    assert await owner(at, lane) is None


async def test_stopping_does_not_wait_for_ever(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    sums.hold = asyncio.Event()
    await at.put("items", item(1, 7))
    lane = at.lane_of("sums", item(1, 7))
    worker = at.worker("w")
    async with running(worker.drain(lane)):
        await sums.computed(1)
        await worker.stop(0.01)
    assert await at.counters() == (0, 0, 1)
    sums.hold = None
    await at.settle(at.drain("sums"))
    assert await at.counters() == (1, 0, 0)


async def test_a_claim_without_a_job_is_taken_up_when_its_bell_rings(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    worker, lane = at.worker("w"), at.lane_of("sums", item(1, 7))
    await at.lanes.alive("w")
    await at.lanes.claim(lane, "w")
    async with running(worker.listen()):
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await at.redis.publish(f"{at.lanes.prefix}:jobs", b""):
                await asyncio.sleep(0.01)  # a subscription sends no signal to others
            await at.put("items", item(1, 7))
        await sums.computed(1)
        await worker.stop(DEADLINE_SECONDS)
    assert at.enqueued == []
    assert await owner(at, lane) is None


async def test_a_lane_goes_to_a_worker_with_less_to_do(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    lane = at.lane_of("sums", item(1, 7))
    await at.put("items", item(1, 7))
    one, two = at.worker("one"), at.worker("two")
    for worker in (one, two):
        await at.lanes.alive(worker.name)
        await worker._sweep_once()
        await worker._balance()
    assert await at.lanes.loads("one", 0.0) == {"one": 0.0, "two": 0.0}
    async with running(one.drain(lane), two.listen()):
        await sums.computed(1)
        one._given[lane] = "two"
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (await at.redis.pubsub_numsub(f"{at.lanes.prefix}:bell:two"))[0][1]:
                await asyncio.sleep(0.01)  # as above
            await at.put("items", item(2, 7))  # nobody listens to the bell of the first one
            one._ring(lane)
            while await owner(at, lane) != "two":
                await asyncio.sleep(0.01)
        await sums.computed(2)
        await at.lanes.alive("two")
        await at.put("items", item(3, 7))
        await sums.computed(3)
        await one.stop(DEADLINE_SECONDS)
        await two.stop(DEADLINE_SECONDS)
    await at.settle(at.drain("sums"))
    assert await at.counters() == (3, 0, 0)


async def test_a_lane_stays_where_it_is_when_the_other_worker_is_gone(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    lane = at.lane_of("sums", item(1, 7))
    await at.lanes.alive("one")
    await at.lanes.claim(lane, "one")
    assert not await at.lanes.hand_over(at.writer.generation, lane, "one", "gone")
    assert not await at.lanes.hand_over(at.writer.generation, lane, "another", "one")
    assert await owner(at, lane) == "one"
    await at.lanes.loads("gone", 3.0)
    assert await at.lanes.loads("one", 1.0) == {"one": 1.0}


async def test_a_job_survives_a_redis_that_is_away(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    worker, lane = at.worker("w"), at.lane_of("sums", item(1, 7))
    nowhere = Redis(connection_pool=connection_pool("redis://127.0.0.1:1", retries=0))
    worker._lanes = Lanes(nowhere, "nowhere")
    try:
        await worker.drain(lane)
    finally:
        await nowhere.aclose(close_connection_pool=True)
    worker._lanes = at.lanes
    await at.put("items", item(1, 7))
    async with running(worker.drain(lane)):
        await sums.computed(1)
        await worker.stop(DEADLINE_SECONDS)


async def test_a_job_of_a_handler_or_lane_that_is_not_there_ends(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    worker = at.worker("w")
    await worker.drain(Lane("nobody", 0))
    await worker.drain(Lane("sums", 99))
    assert await owner(at, Lane("sums", 99)) is None


async def test_two_workers_share_the_lanes(at: Bench, sums: Sums) -> None:
    await at.load(sums.on)
    workers = [at.worker("one"), at.worker("two")]
    for worker in workers:
        await at.lanes.alive(worker.name)
    groups = at.groups("sums")
    for grp in groups:
        await at.put("items", item(1, grp))
    jobs = [workers[n % 2].drain(lane) for n, lane in enumerate(at.enqueued)]
    async with running(*jobs):
        await sums.computed(len(groups))
        owners = {await owner(at, Lane("sums", number)) for number in range(at.lane_count)}
        assert owners == {"one", "two"}
        for worker in workers:
            await worker.stop(DEADLINE_SECONDS)
    assert sorted(sums.keys) == sorted(groups)
