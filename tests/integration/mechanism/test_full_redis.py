"""A Redis that is full: what it refuses is refused wholly, waits, and is written once when there is room."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ResponseError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from standin.embedded import EmbeddedRedis
from tests.integration.mechanism.bench import Bench, bench, item
from tests.stack import Servers
from worker import Change, Handlers
from worker.change import Position
from worker.lane_writer import LaneWriter
from worker.lanes import Content, Lane
from worker.queue import refuses_for_now

LANES = [Lane("one", number) for number in range(4)]
ENTRIES = 40
SIZE = 50_000


@pytest.fixture
async def full(shared: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    """A bench with a Redis of its own, for its memory is limited."""
    async with (
        EmbeddedRedis(tmp_path_factory.mktemp("full")) as redis,
        bench(Servers(shared.postgres, redis)) as made,
    ):
        yield made


async def room(at: Bench, size: int) -> None:
    """Leave Redis so many bytes above what it uses."""
    used = (await at.redis.info("memory"))["used_memory"]
    await at.redis.config_set("maxmemory", used + size)


async def enqueued(at: Bench) -> list[int]:
    return sorted(
        [
            read.position.lsn
            for lane in LANES
            for read in (await at.lanes.read("g", lane, Position.ZERO, 1000)).reads
        ]
    )


def stage(to: LaneWriter, first: int) -> list[int]:
    numbers = list(range(first, first + ENTRIES))
    for number in numbers:
        lane = LANES[number % len(LANES)]
        content = Content((lane.number,), (b'["1"]',), "realtime", b"x" * SIZE, 1.0)
        to.stage(lane, Position(number, 0), content)
    return numbers


async def test_a_batch_for_which_memory_ends_is_written_wholly_or_not_at_all(full: Bench) -> None:
    to = LaneWriter(full.lanes, "g", "me", Position(10, 0))
    await to.begin()
    before, outcomes = list[int](), set[str]()
    # What is sent counts as memory too: with the larger of these the end comes among the entries, or never.
    for share in (0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.0, 3.0):
        batch = stage(to, 11 + len(before))
        await room(full, int(share * ENTRIES * SIZE))
        try:
            await to.flush()
            outcomes.add("written")
        except ResponseError as error:
            outcomes.add("refused" if refuses_for_now(error) else "misunderstood")
            assert await enqueued(full) == before
            # Room is made, and the same batch is sent again.
            await full.redis.config_set("maxmemory", 0)
            await to.flush()
        await full.redis.config_set("maxmemory", 0)
        before += batch
        assert await enqueued(full) == before
    assert outcomes == {"refused", "written"}


async def test_a_change_larger_than_redis_takes_waits_and_is_applied_once(full: Bench) -> None:
    on = Handlers()

    @on.change("items", name="one", lane_key="grp")
    async def one(change: Change, session: AsyncSession) -> None:
        assert change.record is not None
        await session.execute(text("insert into derived_log (id) values (:id)"), {"id": change.record["id"]})

    await full.load(on)
    add, refused = full.lanes.add_script, asyncio.Event()

    async def look(**named: Any) -> Any:
        try:
            return await add(**named)
        except ResponseError:
            refused.set()
            raise

    full.lanes.add_script = look  # type: ignore[assignment]
    await full.put("items", item(1, 1))
    await room(full, 1_000_000)
    full.take("items", item(2, 1, "x" * 8_000_000))
    full.take("items", item(3, 1))
    writing = asyncio.create_task(full.journal.flush(), name="test: flush")
    async with asyncio.timeout(30):
        await refused.wait()
        drain = full.drain("one")
        await drain.run(full.lane_of("one", item(1, 1)))
        assert await full.log() == [1]
        assert not writing.done()
        await full.redis.config_set("maxmemory", 0)
        await writing
    await full.settle(drain)
    assert await full.log() == [1, 2, 3]
    assert full.journal.trouble is None
    assert await full.count("tailrace.gaps") == 0
