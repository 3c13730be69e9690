"""Changes of several lanes: applied once, in the order of each of their keys, whoever comes first."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, Handlers
from worker.draining.drain import Drain
from worker.draining.passes import Pass
from worker.lanes import Lane


class Shop:
    """A handler whose lane key is `grp`; rows named in `bad` fail."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.on = Handlers()

        @self.on.change("items", name="one", lane_key="grp")
        async def one(change: Change, session: AsyncSession) -> None:
            row = change.record or change.old_record
            assert row is not None
            await session.execute(
                text("insert into derived_log (position, id, note) values (:position, :id, :note)"),
                {"position": str(change.position), "id": row["id"], "note": row["note"]},
            )
            if row["note"] in self.bad:
                raise ValueError("no")


@pytest.fixture
def shop() -> Shop:
    return Shop()


@asynccontextmanager
async def held_by_another(at: Bench, *lanes: int) -> AsyncIterator[None]:
    """Keep the rows of lanes locked, as another worker that drains them does."""
    async with at.engine.begin() as connection:
        await connection.execute(
            text("select 1 from tailrace.lanes where lane = any(:lanes) for update"), {"lanes": list(lanes)}
        )
        yield


async def exchange(at: Bench) -> None:
    a, b, *_ = at.groups("one")
    await at.put("items", item(1, b, "older of b"))
    await at.put("items", item(2, b, "moved"), item(2, a))
    await at.put("items", item(1, b, "later of b"))
    await at.put("items", item(3, a, "later of a"))


def in_order(log: list[str]) -> bool:
    assert sorted(log) == ["later of a", "later of b", "moved", "older of b"]
    return log.index("older of b") < log.index("moved") < log.index("later of b") and log.index(
        "moved"
    ) < log.index("later of a")


async def test_the_lowest_lane_applies_when_all_have_come(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    low, high = Lane("one", 0), Lane("one", 1)
    await exchange(at)
    drain = at.drain("one")
    async with held_by_another(at, 1):
        waiting = await drain.run(low)
        assert (waiting.ended, waiting.wake) == (Pass.MEETING, {1})
        again = await drain.run(low)
        assert (again.ended, again.wake) == (Pass.MEETING, set())  # it has rung once
    async with held_by_another(at, 0):
        assert (await drain.run(high)).applied == 1
        arrived = await drain.run(high)
        assert (arrived.ended, arrived.wake) == (Pass.MEETING, {0})
    met = await drain.run(low)
    assert met.applied > 0
    await at.settle(drain)
    assert in_order(await at.log("note"))
    assert await at.counters() == (4, 0, 0)


@pytest.mark.parametrize("first", [0, 1])
async def test_whoever_comes_first_takes_the_other_lane_along(at: Bench, shop: Shop, first: int) -> None:
    await at.load(shop.on)
    await exchange(at)
    drain = at.drain("one")
    applied = 0
    for _ in range(3):
        applied += (await drain.run(Lane("one", first))).applied
    # The lane is empty then, and of the other one all that came before its last change of both is applied.
    assert applied >= 3
    assert await at.count("tailrace.lanes where handler = 'one' and arrived_lsn is not null") == 0
    await at.settle(drain)
    assert in_order(await at.log("note"))
    assert await at.counters() == (4, 0, 0)


async def test_a_thousand_moves_take_few_passes(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    groups = at.groups("one")
    rng = random.Random(9)
    where = [rng.choice(groups) for _ in range(20)]
    for n in range(1000):
        id_, grp = rng.randrange(20), rng.choice(groups)
        at.take("items", item(id_, grp, str(n)), item(id_, where[id_]))
        where[id_] = grp
    await at.journal.flush()
    drain = at.drain("one")
    passes = 0
    while await at.count("derived_log") < 1000:
        await drain.run(Lane("one", passes % at.lane_count))
        passes += 1
    assert passes < 100
    assert sorted(await at.log("note"), key=int) == [str(n) for n in range(1000)]
    assert await at.counters() == (1000, 0, 0)


async def test_a_held_key_holds_the_change_that_leaves_it(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    a, b, *_ = at.groups("one")
    shop.bad = {"bad"}
    await at.put("items", item(1, b, "bad"))
    await at.put("items", item(1, a, "moved"), item(1, b, "bad"))
    await at.put("items", item(1, a, "of a"))
    await at.put("items", item(9, b, "of b"))
    drain = at.drain("one")
    for number in (1, 0, 1, 0, 1, 0):
        await drain.run(Lane("one", number))
    assert await at.log("note") == []
    assert await at.holding_is_true()
    assert await at.counters() == (0, 4, 0)
    shop.bad.clear()
    await at.settle(drain)
    log = await at.log("note")
    assert log[:2] == ["bad", "moved"]
    assert sorted(log[2:]) == ["of a", "of b"]
    assert await at.holding_is_true()
    assert await at.counters() == (4, 0, 0)


@pytest.mark.parametrize("lost_in", [0, 1])
async def test_a_change_that_one_lane_has_lost_stops_no_other(at: Bench, shop: Shop, lost_in: int) -> None:
    await at.load(shop.on)
    a, b, *_ = at.groups("one")
    await at.put("items", item(1, b, "moved"), item(1, a))
    await at.put("items", item(2, a, "of a"))
    await at.put("items", item(3, b, "of b"))
    key = at.lanes.key(at.writer.generation, Lane("one", lost_in))
    ((id_, _), *_) = await at.redis.xrange(key, count=1)
    await at.redis.xdel(key, id_)
    drain = at.drain("one")
    await at.settle(drain)
    assert sorted(await at.log("note")) == ["of a", "of b"]
    assert await at.count("tailrace.gaps") == 1


async def test_a_hole_before_a_meeting_is_recorded_once(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    a, b, *_ = at.groups("one")
    await at.put("items", item(1, b, "lost"))
    await at.put("items", item(1, b, "moved"), item(1, a))
    key = at.lanes.key(at.writer.generation, Lane("one", 1))
    ((id_, _), *_) = await at.redis.xrange(key, count=1)
    await at.redis.xdel(key, id_)
    drain = at.drain("one")
    async with held_by_another(at, 0):
        for _ in range(3):
            assert (await drain.run(Lane("one", 1))).ended is Pass.MEETING
    await at.settle(drain)
    assert await at.log("note") == ["moved"]
    assert await at.count("tailrace.gaps") == 1


@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_passes_keeps_the_order_of_each_key(at: Bench, shop: Shop, seed: int) -> None:
    rng = random.Random(seed)
    await at.load(shop.on)
    groups = at.groups("one")
    where: dict[int, int] = {}
    touched: dict[int, list[str]] = {grp: [] for grp in groups}
    for n in range(40):
        id_, grp = rng.randrange(6), rng.choice(groups)
        old = where.get(id_)
        at.take("items", item(id_, grp, str(n)), None if old is None else item(id_, old))
        for one in {grp, old} - {None}:
            assert one is not None
            touched[one].append(str(n))
        where[id_] = grp
    await at.journal.flush()
    drains = [at.drain("one", batch=rng.choice([1, 3, 500])) for _ in range(2)]
    for _ in range(40):
        await rng.choice(drains).run(Lane("one", rng.randrange(at.lane_count)))
    await at.settle(*drains)
    log = await at.log("note")
    assert sorted(log, key=int) == [str(n) for n in range(40)]
    for notes in touched.values():
        assert [note for note in log if note in notes] == notes


@pytest.mark.parametrize("seed", range(2))
async def test_two_workers_at_once_keep_the_order_of_each_key(at: Bench, shop: Shop, seed: int) -> None:
    rng = random.Random(seed)
    await at.load(shop.on)
    groups = at.groups("one")
    where: dict[int, int] = {}
    touched: dict[int, list[str]] = {grp: [] for grp in groups}
    for n in range(150):
        id_, grp = rng.randrange(20), rng.choice(groups)
        old = where.get(id_)
        at.take("items", item(id_, grp, str(n)), None if old is None else item(id_, old))
        for one in {grp, old} - {None}:
            assert one is not None
            touched[one].append(str(n))
        where[id_] = grp
    await at.journal.flush()

    async def work(drain: Drain, number: int) -> None:
        # A lane may be locked or have to meet: in vain is no end.
        while (await drain.run(Lane("one", number))).ended is not Pass.EMPTY:
            await asyncio.sleep(0)

    drains = [at.drain("one", batch=batch) for batch in (3, 50)]
    async with asyncio.timeout(60):
        await asyncio.gather(*(work(drain, number) for drain in drains for number in range(at.lane_count)))
    await at.settle(*drains)
    log = await at.log("note")
    assert sorted(log, key=int) == [str(n) for n in range(150)]
    for notes in touched.values():
        assert [note for note in log if note in notes] == notes
    assert await at.counters() == (150, 0, 0)
