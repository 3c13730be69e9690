"""Several lanes in one transaction: as if each had made a pass of its own, or not at all."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from functools import partial

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, at_once, item
from worker import Change, Handlers
from worker.draining.drain import Drain
from worker.draining.passes import Pass
from worker.draining.turns import Draining
from worker.lanes import Lane, News

DEADLINE_SECONDS = 20.0
WRITE = text("insert into derived_log (handler, position, id, note) values ('one', :position, :id, :note)")


class Log:
    """A handler that writes down what it is given, waits at one note, and refuses another."""

    def __init__(self) -> None:
        self.on = Handlers()
        self.holds: dict[str, asyncio.Event] = {}
        self._news = asyncio.Condition()
        self._calls: list[str] = []

        @self.on.change("items", name="one", lane_key="grp")
        async def one(change: Change, session: AsyncSession) -> None:
            row = change.record or change.old_record
            assert row is not None
            values = {"position": str(change.position), "id": row["id"], "note": row["note"]}
            await session.execute(WRITE, values)
            async with self._news:
                self._calls.append(row["note"])
                self._news.notify_all()
            if row["note"] in self.holds:
                await self.holds[row["note"]].wait()
            if row["note"] == "refused":
                raise ValueError

    async def called(self, note: str) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS), self._news:
            await self._news.wait_for(lambda: note in self._calls)


@pytest.fixture
def log() -> Log:
    return Log()


async def fill(at: Bench, numbers: Iterable[int], notes: Iterable[str]) -> dict[Lane, News]:
    """Write a change for each note into each lane; tell what bells would tell of all these lanes."""
    groups = at.groups("one")
    numbers = list(numbers)
    for note in notes:
        for number in numbers:
            at.take("items", item(number, groups[number], note))
    await at.journal.flush()
    return await at.told("one", numbers)


async def notes(at: Bench, number: int) -> list[str]:
    return [
        row[0] for row in await at.db.fetch("select note from derived_log where id = $1 order by n", number)
    ]


async def transactions(at: Bench) -> int:
    return int(await at.db.fetchval("select count(distinct xmin::text) from derived_log"))


async def test_lanes_are_applied_in_one_transaction_each_in_its_order(at: Bench, log: Log) -> None:
    await at.load(log.on)
    news = await fill(at, range(at.lane_count), ["a", "b", "c"])
    shared = await at.drain("one").run_several(news)
    assert {lane.number: progress.ended for lane, progress in shared.lanes.items()} == dict.fromkeys(
        range(at.lane_count), Pass.EMPTY
    )
    assert await transactions(at) == 1
    for number in range(at.lane_count):
        assert await notes(at, number) == ["a", "b", "c"]
    assert await at.counters() == (3 * at.lane_count, 0, 0)
    again = await at.drain("one").run_several(news)
    assert again.lanes == {}
    assert await at.count("derived_log") == 3 * at.lane_count


async def test_one_that_dies_at_any_statement_leaves_nothing_half(at: Bench, log: Log) -> None:
    await at.load(log.on)
    drain = at.drain("one")
    news = await fill(at, range(3), ["0"])
    with at.killed_at(0) as statements:
        await drain.run_several(news)
    assert statements[0] == 6  # take, an insert for each change, move, commit
    for step in range(1, statements[0] + 1):
        news = await fill(at, range(3), [str(step)])
        with at.killed_at(step):
            assert (await drain.run_several(news)).lanes == {}
        assert await notes(at, 1) == [str(n) for n in range(step)]
        for lane, what in news.items():
            assert (await drain.run(lane, what)).applied == 1
    for number in range(3):
        assert await notes(at, number) == [str(n) for n in range(statements[0] + 1)]
    assert (await at.counters())[1:] == (0, 0)


async def test_what_one_lane_refuses_is_applied_in_the_others_by_their_own_passes(
    at: Bench, log: Log
) -> None:
    await at.load(log.on)
    drain = at.drain("one")
    groups = at.groups("one")
    for number, note in enumerate(["a", "refused", "b"]):
        at.take("items", item(number, groups[number], note))
    await at.journal.flush()
    news = await at.told("one", range(3))
    for lane in news:
        await drain.run(lane)  # of the first a pass is known
    assert await notes(at, 0) == ["a"]
    assert await at.count("tailrace.held") == 1
    news = await fill(at, range(3), ["c"])
    shared = await drain.run_several(news)
    # What waits behind a held change is nothing for a transaction over several lanes.
    assert {lane.number for lane in shared.lanes} == {0, 2}
    assert (await drain.run(Lane("one", 1), news[Lane("one", 1)])).read == 1
    assert await at.holding_is_true()
    assert await at.counters() == (4, 2, 0)


async def test_a_failure_leaves_each_lane_to_itself(at: Bench, log: Log) -> None:
    await at.load(log.on)
    drain = at.drain("one")
    for lane in await fill(at, range(3), ["a"]):
        await drain.run(lane)
    groups = at.groups("one")
    for number, note in enumerate(["b", "refused", "c"]):
        at.take("items", item(number, groups[number], note))
    await at.journal.flush()
    news = await at.told("one", range(3))
    assert (await drain.run_several(news)).lanes == {}
    assert not drain.shares
    assert await at.count("derived_log") == 3
    for lane, what in news.items():
        await drain.run(lane, what)
    assert await at.counters() == (5, 1, 0)


async def test_lanes_that_are_not_plain_are_left_to_their_own_passes(at: Bench, log: Log) -> None:
    await at.load(log.on)
    drain = at.drain("one")
    groups = at.groups("one")
    news = await fill(at, range(4), ["a"])
    locked, torn, moved, free = news
    # Somebody else has the row of the first, an entry of the second is lost, the third's is of two lanes.
    await fill(at, [torn.number], ["b"])
    late = (await at.told("one", [torn.number]))[torn]
    news[torn] = News(late.base, late.reads[1:])
    old = item(9, groups[moved.number])
    at.take("items", item(9, groups[free.number]), old)
    await at.journal.flush()
    news |= await at.told("one", [moved.number, free.number])
    async with at.engine.begin() as other:
        await other.execute(text("select from tailrace.lanes where lane = 0 for update"))
        shared = await drain.run_several(news)
    assert {lane: progress.ended for lane, progress in shared.lanes.items()} == {
        moved: Pass.MORE,
        free: Pass.MORE,
    }
    assert locked.number == 0
    assert await at.count("derived_log") == 2
    await at.settle(drain)
    assert await notes(at, torn.number) == ["a", "b"]
    assert await at.counters() == (6, 0, 0)


async def test_a_paused_handler_is_not_called(at: Bench, log: Log) -> None:
    await at.load(log.on)
    news = await fill(at, range(3), ["a"])
    await at.db.execute("update tailrace.handlers set paused = true")
    assert (await at.drain("one").run_several(news)).lanes == {}
    assert await at.count("derived_log") == 0


@asynccontextmanager
async def drained(at: Bench, worker: Draining, lanes: Iterable[Lane]) -> AsyncIterator[None]:
    """Have a worker drain these lanes, and hear its bells."""
    await at.lanes.alive(worker.name)
    tasks = [asyncio.create_task(work) for work in (worker.listen(), *map(worker.drain, lanes))]
    try:
        yield
    finally:
        await worker.stop(DEADLINE_SECONDS)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def applied(at: Bench, count: int) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await at.count("derived_log") < count:
            await asyncio.sleep(0.005)


async def warm(at: Bench, log: Log, lanes: list[Lane]) -> None:
    """Have the worker claim the lanes, and learn what passes cost."""
    await fill(at, [lane.number for lane in lanes], ["first"])
    await applied(at, len(lanes))
    await log.called("first")


async def test_lanes_that_wait_for_each_other_go_together(at: Bench, log: Log) -> None:
    await at.load(log.on)
    lanes = [Lane("one", number) for number in range(at.lane_count)]
    worker = at.worker("w")
    async with drained(at, worker, lanes):
        await warm(at, log, lanes)
        before = await transactions(at)
        log.holds["slow"] = asyncio.Event()
        await fill(at, [0], ["slow"])
        await log.called("slow")
        await fill(at, range(1, at.lane_count), ["b"])
        asyncio.get_running_loop().call_later(0.02, log.holds["slow"].set)
        await applied(at, 2 * at.lane_count)
        assert await transactions(at) <= before + at.lane_count - 1
    assert await at.counters() == (2 * at.lane_count, 0, 0)


async def test_a_call_that_does_not_end_holds_up_no_other_lane(at: Bench, log: Log) -> None:
    await at.load(log.on)
    lanes = [Lane("one", number) for number in range(at.lane_count)]
    async with drained(at, at.worker("w"), lanes):
        await warm(at, log, lanes)
        log.holds["hangs"] = asyncio.Event()
        await fill(at, [0], ["hangs"])
        await log.called("hangs")
        for n in range(3):
            await fill(at, range(1, at.lane_count), [str(n)])
            await applied(at, at.lane_count + (n + 1) * (at.lane_count - 1))
        log.holds["hangs"].set()
    assert await notes(at, 1) == ["first", "0", "1", "2"]


async def some_passes(at: Bench, rng: random.Random, drains: list[Drain]) -> None:
    """Have each drain make a pass over several lanes, and beside it some over single ones."""
    passes = []
    for drain in drains:
        news = await at.told("one", rng.sample(range(at.lane_count), rng.randrange(1, at.lane_count + 1)))
        passes += [partial(drain.run_several, news)]
        passes += [partial(drain.run, lane, what) for lane, what in news.items() if rng.random() < 0.3]
    with at.killed_at(rng.choice([0, 0, rng.randrange(1, 12)])):
        await at_once(*passes)


@pytest.mark.parametrize("seed", range(3))
async def test_beside_passes_of_single_lanes_nothing_is_lost_or_doubled(
    at: Bench, log: Log, seed: int
) -> None:
    rng = random.Random(seed)
    await at.load(log.on)
    drains = [at.drain("one", batch=rng.choice([3, 500])) for _ in range(2)]
    for n in range(20):
        await fill(at, rng.sample(range(at.lane_count), 2), [str(n)])
        await some_passes(at, rng, drains)
    await at.settle(*drains)
    for number in range(at.lane_count):
        found = await notes(at, number)
        assert found == sorted(set(found), key=int)
    assert await at.counters() == (40, 0, 0)
