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
from worker import Change, Handlers, status
from worker.change import Position
from worker.draining.passes import Pass
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
    positions = []
    for lane in LANES:
        after = Position.ZERO
        while reads := (await at.lanes.read("g", lane, after, 1000)).reads:
            positions += [read.position.lsn for read in reads]
            after = reads[-1].position
    return sorted(positions)


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


class Log:
    """A handler that notes what it is given, and how long that was."""

    def __init__(self) -> None:
        self.on = Handlers()
        self.sizes: list[int] = []
        self.fails = False

        @self.on.change("items", name="one", lane_key="grp")
        async def one(change: Change, session: AsyncSession) -> None:
            assert change.record is not None
            if self.fails:
                raise ValueError
            self.sizes.append(len(change.record["note"]))
            await session.execute(
                text("insert into derived_log (id) values (:id)"), {"id": change.record["id"]}
            )


@pytest.fixture
async def log(full: Bench) -> Log:
    made = Log()
    await full.load(made.on)
    return made


async def test_a_change_larger_than_redis_takes_goes_by_way_of_postgres_in_its_order(
    full: Bench, log: Log
) -> None:
    await room(full, 1_000_000)
    async with asyncio.timeout(30):
        await full.put("items", item(1, 1))
        full.take("items", item(2, 1, "x" * 8_000_000))
        full.take("items", item(3, 1))
        await full.journal.flush()
    assert await full.count("tailrace.payloads") == 1
    told = (await status.read(full.engine, full.lanes))["handlers"]["one"]
    assert (told["queued"], sum(told["lanes"]["queued"]), told["payloads"]) == (3, 3, 1)
    assert told["queued_bytes"] > told["payload_bytes"] > 8_000_000
    await full.settle(full.drain("one"))
    assert await full.log() == [1, 2, 3]
    assert log.sizes == [0, 8_000_000, 0]
    assert await full.count("tailrace.gaps") == 0
    await full.journal.sweep()
    assert await full.count("tailrace.payloads") == 0


async def test_a_batch_larger_than_redis_takes_goes_by_way_of_postgres(full: Bench, log: Log) -> None:
    await room(full, 1_500_000)
    async with asyncio.timeout(30):
        for number in range(20):
            full.take("items", item(number, number, "x" * 200_000))
        await full.journal.flush()
    assert await full.count("tailrace.payloads") == 20
    # With room again, what fits goes by way of Redis.
    await full.redis.config_set("maxmemory", 0)
    await full.put("items", item(20, 1, "x" * 200_000))
    assert await full.count("tailrace.payloads") == 20
    await full.settle(full.drain("one"))
    assert sorted(await full.log()) == list(range(21))


async def test_what_cannot_be_made_smaller_waits_for_room(full: Bench, log: Log) -> None:
    refused, add = asyncio.Event(), full.lanes.add_script
    times = 0

    async def look(**named: Any) -> Any:
        nonlocal times
        try:
            return await add(**named)
        except ResponseError:
            times += 1
            if times > 2:
                refused.set()
            raise

    full.lanes.add_script = look  # type: ignore[assignment]
    await full.redis.config_set("maxmemory", 1)
    full.take("items", item(1, 1, "x" * 5_000))
    writing = asyncio.create_task(full.journal.flush(), name="test: flush")
    async with asyncio.timeout(30):
        await refused.wait()
        assert not writing.done()
        assert full.journal.trouble is not None
        await full.redis.config_set("maxmemory", 0)
        await writing
    assert full.journal.trouble is None
    await full.settle(full.drain("one"))
    assert log.sizes == [5_000]


async def test_large_changes_are_held_parked_and_retried_as_others_are(full: Bench, log: Log) -> None:
    lane, drain = full.lane_of("one", item(1, 1)), full.drain("one")
    log.fails = True
    for number in range(3):
        await full.put("items", item(number, 1, "x" * (2_000_000 + number)))
    await drain.run(lane)
    assert await full.count("tailrace.held where length(payload) > 2000000") == 3
    await full.db.execute("update tailrace.handlers set paused = true")
    for number in range(3, 6):
        await full.put("items", item(number, 1, "x" * (2_000_000 + number)))
    await drain.run(lane)
    assert await full.count("tailrace.held where status = 'parked' and length(payload) > 2000000") == 3
    await full.journal.sweep()
    assert await full.count("tailrace.payloads") == 0
    await full.db.execute("update tailrace.handlers set paused = false")
    log.fails = False
    await full.settle(full.drain("one"))
    assert await full.log() == list(range(6))
    assert log.sizes == [2_000_000 + number for number in range(6)]


async def test_a_pass_has_few_large_changes_in_memory(full: Bench, log: Log) -> None:
    for number in range(6):
        await full.put("items", item(number, 1, "x" * 3_000_000))
    applied = []
    while (progress := await full.drain("one").run(full.lane_of("one", item(1, 1)))).ended is not Pass.EMPTY:
        applied.append(progress.applied)
    assert [*applied, progress.applied] == [2, 2, 2]


async def test_a_payload_stays_until_every_lane_of_its_change_has_passed_it(full: Bench, log: Log) -> None:
    first, second = full.groups("one")[:2]
    await full.put("items", item(1, second, "x" * 2_000_000), item(1, first))
    lanes = [full.lane_of("one", item(1, grp)) for grp in (first, second)]
    drain = full.drain("one")
    # Whatever the first lane has passed, by a gap or otherwise: the other one still comes to it.
    await full.db.execute(
        "update tailrace.lanes set lsn = $1 where (handler, lane) = ('one', $2)", 2**60, lanes[0].number
    )
    await full.journal.sweep()
    assert await full.count("tailrace.payloads") == 1
    await drain.run(lanes[1])
    await full.journal.sweep()
    assert await full.count("tailrace.payloads") == 0


async def test_payloads_of_another_generation_go_and_only_by_who_has_the_lease(full: Bench, log: Log) -> None:
    await full.put("items", item(1, 1, "x" * 2_000_000))
    old = full.journal
    await full.begin()
    await full.put("items", item(2, 1, "x" * 2_000_000))
    await full.db.execute("update tailrace.source set lease_token = 'another'")
    await full.journal.sweep()
    assert await full.count("tailrace.payloads") == 2
    await full.db.execute("update tailrace.source set lease_token = $1", full.token)
    await full.journal.sweep()
    assert await full.db.fetch("select generation from tailrace.payloads") == [(full.journal.generation,)]
    await full.settle(full.drain("one"))
    assert await full.log() == [2]
    assert old.generation != full.journal.generation


async def test_a_payload_that_is_gone_is_read_again_where_that_can_be(full: Bench, log: Log) -> None:
    await full.put("items", item(1, 1, "x" * 2_000_000))
    await full.db.execute("delete from tailrace.payloads")
    await full.db.execute(
        "update tailrace.source set delivery = 'proven', server_started = pg_postmaster_start_time(),"
        " timeline = (select timeline_id from pg_control_checkpoint())"
    )
    lane = full.lane_of("one", item(1, 1))
    assert (await full.drain("one").run(lane)).ended is Pass.HOLE
    assert await full.db.fetchval("select reread is not null from tailrace.source")
    assert await full.log() == []
    # In plain delivery it cannot: then a person is to know which change it was.
    await full.db.execute("update tailrace.source set delivery = 'plain'")
    await full.drain("one").run(lane)
    assert "payload" in await full.db.fetchval("select error from tailrace.held")
