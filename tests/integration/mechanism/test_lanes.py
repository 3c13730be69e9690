"""The lanes in Redis: what is added, refused, claimed, swept and trimmed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Handlers
from worker.change import Position
from worker.lane_writer import LaneWriter
from worker.lanes import CLAIM_SECONDS, Content, Lane, LanesLostError, LeaseLostError, Read, heard

A = Lane("module.with:colons" + "x" * 180, 3)
B = Lane("b", 0)

Bell = tuple[str, dict[Lane, list[Read]]]


@pytest.fixture
def on() -> Handlers:
    on = Handlers()

    @on.derive("items", by="grp", name="sums")
    async def sums(keys: list[int], session: AsyncSession) -> None:
        """Nothing is computed here."""

    return on


def writer(at: Bench, holder: str = "me") -> LaneWriter:
    return LaneWriter(at.lanes, "g", holder, Position(10, 0))


def stage(to: LaneWriter, lane: Lane, position: int, *, payload: bytes = b"{}") -> None:
    content = Content((lane.number,), (b'["1"]',), "realtime", payload, 1.0)
    to.stage(lane, Position(position, 0), content)


async def positions(at: Bench, lane: Lane, after: int = 0) -> list[int]:
    return [read.position.lsn for read in (await at.lanes.read("g", lane, Position(after, 0), 1000)).reads]


async def test_entries_name_the_one_before_them_and_come_back_in_order(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    stage(to, A, 11)
    stage(to, B, 11)
    assert set(await to.flush()) == {A, B}
    stage(to, A, 12)
    stage(to, A, 13)
    assert await to.flush() == []  # their job is on the way
    reads = (await at.lanes.read("g", A, Position(0, 0), 10)).reads
    assert [(read.position.lsn, read.entry.previous) for read in reads] == [
        (11, "10-0"),
        (12, "11-0"),
        (13, "12-0"),
    ]
    assert (await to.backlog()).entries == 4
    await at.lanes.trim("g", {A: reads[1]})
    assert (await to.backlog()).entries == 2
    assert await positions(at, A) == [13]
    assert to.last == Position(13, 0)


async def test_a_long_lane_is_read_in_parts_bounded_by_bytes(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    for n in range(250):
        stage(to, A, 11 + n)
    await to.flush()
    assert len((await at.lanes.read("g", A, Position(0, 0), 1000)).reads) == 250
    assert len((await at.lanes.read("g", A, Position(0, 0), 150)).reads) == 150
    for n in range(250):
        stage(to, B, 300 + n, payload=b"x" * 100_000)
    await to.flush()
    for _ in range(2):  # of the first time nobody knows how wide they are
        found = await at.lanes.read("g", B, Position(0, 0), 1000)
        assert (11 <= len(found.reads) <= 20, found.more) == (True, True)


async def test_another_token_is_refused_and_writes_nothing(at: Bench) -> None:
    mine, other = writer(at), writer(at, "other")
    await mine.begin()
    assert await other.take_over()
    stage(mine, A, 11)
    with pytest.raises(LeaseLostError):
        await mine.flush()
    with pytest.raises(LeaseLostError):
        await mine.check()
    assert await positions(at, A) == []
    stage(other, A, 11)
    await other.flush()
    assert await positions(at, A) == [11]


async def test_take_over_goes_on_where_the_last_one_ended(at: Bench) -> None:
    mine, other = writer(at), writer(at, "other")
    assert not await other.take_over()
    await mine.begin()
    stage(mine, A, 11)
    await mine.flush()
    assert await other.take_over()
    assert other.last == Position(11, 0)
    stage(other, A, 12)
    await other.flush()
    assert [read.entry.previous for read in (await at.lanes.read("g", A, Position(0, 0), 9)).reads] == [
        "10-0",
        "11-0",
    ]
    assert (await other.backlog()).entries == 2


async def test_a_flushed_redis_is_no_place_to_write(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    stage(to, A, 11)
    await to.flush()
    keys = [key async for key in at.redis.scan_iter(f"{at.lanes.prefix}:*")]
    await at.redis.delete(*keys)
    with pytest.raises(LanesLostError):
        await to.check()
    stage(to, A, 12)
    with pytest.raises(LanesLostError):
        await to.flush()
    assert await positions(at, A) == []


async def test_an_older_copy_is_no_place_to_write(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    stage(to, A, 11)
    await to.flush()
    copy = {key: await at.redis.dump(key) async for key in at.redis.scan_iter(f"{at.lanes.base('g')}:*")}
    stage(to, A, 12)
    await to.flush()
    for key, value in copy.items():
        await at.redis.restore(key, 0, value, replace=True)
    stage(to, A, 13)
    with pytest.raises(LanesLostError):
        await to.flush()
    assert await positions(at, A) == [11]


async def test_a_batch_of_unknown_fate_is_not_written_twice(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    for arrived in (True, False):
        position = to.last.lsn + 1
        stage(to, A, position)
        add = at.lanes.add_script

        async def lose(*_: Any, arrived: bool = arrived, add: Any = add, **named: Any) -> Any:
            if arrived:
                await add(**named)
            raise RedisConnectionError("the answer was lost")

        at.lanes.add_script = lose  # type: ignore[assignment]
        with pytest.raises(RedisConnectionError):
            await to.flush()
        at.lanes.add_script = add
        to.unstage()
        stage(to, A, position)
        await to.flush()
    assert await positions(at, A) == [11, 12]
    assert (await to.backlog()).entries == 2


async def test_what_is_taken_in_during_a_flush_of_unknown_fate_is_neither_lost_nor_doubled(
    at: Bench, on: Handlers
) -> None:
    await at.load(on)
    add, calls = at.lanes.add_script, 0

    async def lose(**named: Any) -> Any:
        nonlocal calls
        calls += 1
        answer = await add(**named)
        if calls == 1:
            at.take("items", item(2, 2))  # the reader goes on while a backfill's flush is under way
            raise RedisConnectionError("the answer was lost")
        if calls == 2:
            at.take("items", item(3, 3))
        return answer

    at.lanes.add_script = lose  # type: ignore[assignment]
    await at.journal.put_keys(at.handlers[0], [b'["1"]'])
    at.lanes.add_script = add
    await at.journal.flush()
    keys = [
        key
        for number in range(at.lane_count)
        for read in (
            await at.lanes.read(at.journal.generation, Lane("sums", number), Position(0, 0), 99)
        ).reads
        for key in read.entry.keys
    ]
    assert sorted(keys) == [b'["1"]', b'["2"]', b'["3"]']
    assert await at.count("tailrace.gaps") == 0


async def test_a_batch_that_was_applied_before_redis_forgot_it_is_not_applied_again(
    at: Bench, on: Handlers
) -> None:
    await at.load(on)
    add, drain = at.lanes.add_script, at.drain("sums")

    async def lose(**named: Any) -> Any:
        await add(**named)
        at.lanes.add_script = add
        for number in range(at.lane_count):
            await drain.run(Lane("sums", number))
        await at.redis.delete(at.writer.meta)
        raise RedisConnectionError("flushed before it answered")

    at.lanes.add_script = lose  # type: ignore[assignment]
    await at.put("items", item(1, 1))
    assert at.journal.generation != at.writer.generation
    await at.settle(drain)
    assert (await at.counters())[0] == 1
    await at.put("items", item(2, 1))
    await at.settle(drain)
    assert await at.counters() == (2, 0, 0)
    assert await at.count("tailrace.gaps") == 1


async def test_a_lane_whose_end_has_vanished_is_found(at: Bench, on: Handlers) -> None:
    await at.load(on)
    await at.put("items", item(1, 1))
    lane = at.lane_of("sums", item(1, 1))
    await at.journal.check()
    assert await at.count("tailrace.gaps") == 0
    await at.redis.delete(at.lanes.key(at.journal.generation, lane))
    await at.journal.check()
    assert at.journal.generation != at.writer.generation
    assert [row[1] for row in await at.rows("gaps", "id, cause")] == ["Redis has lost the end of a lane"]
    await at.put("items", item(2, 1))
    assert (await at.drain("sums").run(lane)).applied == 1


async def test_claims(at: Bench) -> None:
    lanes = at.lanes
    await lanes.alive("one")
    await lanes.alive("two")
    assert await lanes.claim(A, "one")
    assert await lanes.claim(A, "one")
    assert not await lanes.claim(A, "two")
    assert 0 < await at.redis.ttl(f"{lanes.prefix}:worker:one") <= CLAIM_SECONDS
    assert await lanes.workers() == ["one", "two"]
    await lanes.gone("one")
    assert await lanes.claim(A, "two")
    assert await lanes.release("g", A, "one")  # not its own any more: nothing to give back
    assert not await lanes.claim(A, "one") or await lanes.workers() != ["two"]


async def test_a_claim_is_kept_where_entries_have_come_meanwhile(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    await at.lanes.alive("one")
    assert await at.lanes.claim(A, "one")
    stage(to, A, 11)
    assert await to.flush() == []  # a living worker drains it: rung, not queued
    assert not await at.lanes.release("g", A, "one")
    (read,) = (await at.lanes.read("g", A, Position(0, 0), 9)).reads
    await at.lanes.trim("g", {A: read})
    assert await at.lanes.release("g", A, "one")


async def test_the_sweep_finds_lanes_with_work_that_nobody_drains(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    stage(to, A, 11)
    stage(to, B, 12)
    await to.flush()
    assert await at.lanes.sweep("g") == []  # their jobs are on the way
    await at.redis.delete(at.lanes.claims)
    assert set(await at.lanes.sweep("g")) == {A, B}
    await at.lanes.alive("dying")
    await at.lanes.claim(A, "dying")
    await at.lanes.claim(B, "dying")
    assert await at.lanes.sweep("g") == []
    await at.lanes.gone("dying")
    (read,) = (await at.lanes.read("g", B, Position(0, 0), 9)).reads
    await at.lanes.trim("g", {B: read})
    assert await at.lanes.sweep("g") == [A]


@asynccontextmanager
async def bell(at: Bench, worker: str) -> AsyncIterator[Callable[[], Awaitable[Bell]]]:
    """Live as a worker, and hear its bell."""
    await at.lanes.alive(worker)
    async with at.redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        await pubsub.subscribe(f"{at.lanes.prefix}:bell:{worker}")

        async def rung() -> Bell:
            async with asyncio.timeout(10):
                while (message := await pubsub.get_message(timeout=1)) is None:
                    pass
            return heard(message["data"])

        yield rung


async def test_a_wake_up_rings_the_worker_that_drains_the_lane(at: Bench) -> None:
    await at.lanes.claim(A, "one")
    async with bell(at, "one") as rung:
        assert await at.lanes.ring([A, B]) == [B]
        assert (await rung())[1] == {A: []}


async def test_a_bell_tells_what_was_written(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    await at.lanes.claim(A, "one")
    await at.lanes.claim(B, "one")
    async with bell(at, "one") as rung:
        stage(to, A, 11, payload=b"\n\n\t\x00\xff")
        stage(to, B, 11)
        stage(to, A, 12, payload=b"")
        await to.flush()
        base, told = await rung()
    assert base == at.lanes.base("g")
    for lane in (A, B):
        assert told[lane] == (await at.lanes.read("g", lane, Position(0, 0), 10)).reads
    assert len(told[A]) == 2


def test_entries_of_a_newer_format_are_left_to_the_look_into_the_stream() -> None:
    assert heard(b"base\tz\nb:0\t11-0\t3\n\nnew") == ("base", {B: []})


@pytest.mark.parametrize("much", [(1, 40_000), (80, 10)], ids=["bytes", "entries"])
async def test_a_bell_tells_only_where_it_is_little(at: Bench, much: tuple[int, int]) -> None:
    to = writer(at)
    await to.begin()
    await at.lanes.claim(A, "one")
    async with bell(at, "one") as rung:
        for n in range(much[0]):
            stage(to, A, 11 + n, payload=b"x" * much[1])
        await to.flush()
        assert (await rung())[1] == {A: []}


async def test_of_a_lane_a_bell_tells_all_or_nothing(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    await at.lanes.claim(A, "one")
    await at.lanes.claim(B, "one")
    async with bell(at, "one") as rung:
        stage(to, B, 11)
        for n in range(3):
            stage(to, A, 11 + n, payload=b"x" * 12_000)  # the third is too much
        await to.flush()
        told = (await rung())[1]
    assert told[A] == []
    assert len(told[B]) == 1


async def test_old_generations_go_by_themselves(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    stage(to, A, 11)
    await to.flush()
    await to.retire("g")
    async for key in at.redis.scan_iter(f"{at.lanes.base('g')}:*"):
        assert await at.redis.ttl(key) > 0


async def test_a_lane_found_empty_counts_as_passed(at: Bench) -> None:
    to = writer(at)
    await to.begin()
    stage(to, A, 11)
    await to.flush()
    await at.lanes.pass_over("g", A, Position(10, 0))
    assert (await to.backlog()).entries == 1
    await at.lanes.pass_over("g", A, Position(11, 0))
    assert (await to.backlog()).entries == 0
    assert Lane.parse(str(A)) == A
