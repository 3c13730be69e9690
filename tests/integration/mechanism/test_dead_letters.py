"""When a change is given up, and what that means for the changes after it."""

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, GiveUp, Handlers, RetryLater
from worker.draining.drain import Drain
from worker.draining.passes import Pass
from worker.lanes import Claim, Lane

WRITE = text("insert into derived_log (handler, id, note) values (:handler, :id, :note)")


class Shop:
    """Two handlers: one goes on after a dead letter, one halts; rows whose note is in `errors` fail."""

    def __init__(self) -> None:
        self.errors: dict[str, Exception] = {}
        self.attempts: list[int] = []
        self.on = Handlers()

        @self.on.change("items", name="goes-on", lane_key="grp")
        async def goes_on(change: Change, session: AsyncSession) -> None:
            await self.meet("goes-on", change, session)

        @self.on.change("items", name="halts", lane_key="grp", after="halt")
        async def halts(change: Change, session: AsyncSession) -> None:
            await self.meet("halts", change, session)

        @self.on.derive("items", name="sums", by="grp", after="halt")
        async def sums(groups: list[int], session: AsyncSession) -> None:
            await session.execute(text("select 1"))
            if "sums" in self.errors:
                raise self.errors["sums"]

    async def meet(self, handler: str, change: Change, session: AsyncSession) -> None:
        row = change.record or change.old_record
        assert row is not None
        self.attempts.append(change.attempt)
        await session.execute(WRITE, {"handler": handler, "id": row["id"], "note": row["note"]})
        if row["note"] in self.errors:
            raise self.errors[row["note"]]


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def passes(at: Bench, drain: Drain, count: int = 1) -> None:
    for _ in range(count):
        await at.make_due()
        for number in range(at.lane_count):
            await drain.run(Lane(drain.handler.name, number))


async def states(at: Bench, handler: str) -> list[tuple[str, int]]:
    rows = await at.db.fetch(
        "select status, attempts from tailrace.held where handler = $1 order by id", handler
    )
    assert await at.holding_is_true()
    return [tuple(row) for row in rows]


async def test_after_its_last_attempt_a_change_is_a_dead_letter_and_its_key_goes_on(
    at: Bench, shop: Shop
) -> None:
    await at.load(shop.on)
    shop.errors["poison"] = ValueError("no")
    for note in ("poison", "second", "third"):
        await at.put("items", item(1, 7, note))
    drain = at.drain("goes-on", max_attempts=3)
    await passes(at, drain, 2)
    assert await states(at, "goes-on") == [("retrying", 2), ("retrying", 0), ("retrying", 0)]
    await passes(at, drain, 2)
    assert await states(at, "goes-on") == [("dead", 3)]
    assert await at.log("note") == ["second", "third"]
    assert shop.attempts == [1, 1, 2, 3, 1, 1]  # the first one in the batch, and again alone
    row = await at.db.fetchrow("select error_class, error, hint, traceback from tailrace.held")
    assert (row["error_class"], row["error"]) == ("ValueError", "no")
    assert "traceback" in row["hint"]
    assert "raise self.errors" in row["traceback"]


async def test_with_one_attempt_the_first_failure_is_the_last(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.errors["poison"] = ValueError("no")
    await at.put("items", item(1, 7, "poison"))
    drain = at.drain("goes-on", max_attempts=1)
    await passes(at, drain)
    assert await states(at, "goes-on") == [("dead", 1)]


async def test_a_handler_that_halts_keeps_its_key_until_a_person_has_decided(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.errors["poison"] = GiveUp("never")
    await at.put("items", item(1, 7, "poison"))
    await at.put("items", item(2, 7, "behind"))
    await at.put("items", item(3, 8, "of another key"))
    drain = at.drain("halts")
    await passes(at, drain, 3)
    assert await states(at, "halts") == [("dead", 1), ("retrying", 0)]
    await at.put("items", item(4, 7, "later"))
    await passes(at, drain, 3)
    assert await states(at, "halts") == [("dead", 1), ("retrying", 0), ("retrying", 0)]
    assert await at.log("note") == ["of another key"]


async def test_a_derive_key_that_halts_stands_for_what_comes_after(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.errors["sums"] = GiveUp("never")
    await at.put("items", item(1, 7, "one"))
    drain = at.drain("sums")
    await passes(at, drain)
    shop.errors.clear()
    await at.put("items", item(2, 7, "two"))
    await passes(at, drain, 2)
    assert await at.rows("held", "status, changes") == [("dead", 2)]


async def test_who_asks_to_be_called_later_uses_up_no_attempt(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.errors["poison"] = RetryLater(60)
    await at.put("items", item(1, 7, "poison"))
    drain = at.drain("goes-on", max_attempts=2)
    await passes(at, drain, 5)
    assert await states(at, "goes-on") == [("retrying", 0)]
    shop.errors["poison"] = ValueError("no")
    await passes(at, drain, 1)
    assert await states(at, "goes-on") == [("retrying", 1)]
    await passes(at, drain, 1)
    assert await states(at, "goes-on") == [("dead", 2)]


class Deadly:
    """A handler that takes its process with it for some rows, and workers that die of it."""

    def __init__(self) -> None:
        self.deadly: set[str] = set()
        self.calling = asyncio.Event()
        self.calls: list[str] = []
        self.on = Handlers()

        @self.on.change("items", name="one", lane_key="grp")
        async def one(change: Change, session: AsyncSession) -> None:
            row = change.record or change.old_record
            assert row is not None
            self.calls.append(row["note"])
            await session.execute(WRITE, {"handler": "one", "id": row["id"], "note": row["note"]})
            if row["note"] in self.deadly:
                self.calling.set()
                await asyncio.Event().wait()  # the end of the process: nothing after it happens

        @self.on.derive("items", name="sums", by="grp")
        async def sums(groups: list[int], session: AsyncSession) -> None:
            await session.execute(text("select 1"))
            if 7 in groups and "sums" in self.deadly:
                self.calling.set()
                await asyncio.Event().wait()

    async def worker(self, at: Bench, name: str, lane: Lane) -> bool:
        """Live as a worker with one lane until it is empty; False where the worker has died of it."""
        drain = at.drain(lane.handler, timeout=60)
        await at.lanes.alive(name)
        if await at.lanes.claim(lane, name) is Claim.FROM_THE_DEAD:
            drain.suspect(lane, name, asyncio.Lock())
        self.calling.clear()
        dying = asyncio.create_task(self.calling.wait(), name="test: dying")
        ended = Pass.MORE
        while ended is not Pass.EMPTY:
            living = asyncio.create_task(drain.run(lane), name="test: living")
            await asyncio.wait({living, dying}, return_when=asyncio.FIRST_COMPLETED)
            if dying.done():
                living.cancel()
                await asyncio.gather(living, return_exceptions=True)
                await at.lanes.gone(name)
                return False
            ended = (await living).ended
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)
        await at.lanes.release(at.journal.generation, lane, name, always=True)
        return True


async def test_a_change_that_has_ended_three_workers_is_a_dead_letter_and_the_lane_goes_on(at: Bench) -> None:
    deadly = Deadly()
    await at.load(deadly.on)
    for n in range(40):
        await at.put("items", item(n, 7, f"{n}"))
    deadly.deadly = {"17"}
    lane = at.lane_of("one", item(1, 7))
    lives = [await deadly.worker(at, f"w{n}", lane) for n in range(4)]
    assert lives == [False, False, False, True]
    assert deadly.calls.count("17") == 3
    assert await at.log("note") == [f"{n}" for n in range(40) if n != 17]
    assert await at.rows("held", "status, error_class") == [("dead", "worker.errors.WorkerDied")]
    assert (await at.counters())[:2] == (39, 1)


async def test_a_key_of_a_derive_handler_that_ends_workers(at: Bench) -> None:
    deadly = Deadly()
    await at.load(deadly.on)
    await at.put("items", item(1, 7))
    deadly.deadly = {"sums"}
    lane = at.lane_of("sums", item(1, 7))
    lives = [await deadly.worker(at, f"w{n}", lane) for n in range(4)]
    assert lives == [False, False, False, True]
    assert await at.rows("held", "status, error_class, keys") == [
        ("dead", "worker.errors.WorkerDied", ['["7"]'])
    ]


async def test_a_held_change_that_ends_workers(at: Bench) -> None:
    deadly = Deadly()
    await at.load(deadly.on)
    lane = at.lane_of("one", item(1, 7))
    await at.put("items", item(1, 7, "first"))
    await at.db.execute("update tailrace.handlers set paused = true")
    await at.drain("one").run(lane)
    await at.db.execute("update tailrace.handlers set paused = false")
    deadly.deadly = {"first"}
    lives = [await deadly.worker(at, f"w{n}", lane) for n in range(4)]
    assert lives == [False, False, False, True]
    assert await at.rows("held", "status, error_class") == [("dead", "worker.errors.WorkerDied")]


async def test_a_parked_change_that_ends_workers_and_the_others_are_not_held_for_it(at: Bench) -> None:
    deadly = Deadly()
    await at.load(deadly.on)
    lane = at.lane_of("one", item(1, 7))
    for n in range(40):
        await at.put("items", item(n, 7, f"{n}"))
    await at.db.execute("update tailrace.handlers set paused = true")
    await at.drain("one").run(lane)
    await at.db.execute("update tailrace.handlers set paused = false")
    deadly.deadly = {"17"}
    lives = [await deadly.worker(at, f"w{n}", lane) for n in range(4)]
    assert lives == [False, False, False, True]
    assert deadly.calls.count("17") == 3
    assert await at.log("note") == [f"{n}" for n in range(40) if n != 17]
    assert await at.rows("held", "status, error_class") == [("dead", "worker.errors.WorkerDied")]
    assert (await at.counters())[:2] == (39, 1)
    assert await at.holding_is_true()


async def test_a_worker_that_is_killed_for_other_reasons_costs_nothing_but_a_slow_start(at: Bench) -> None:
    deadly = Deadly()
    await at.load(deadly.on)
    lane = at.lane_of("one", item(1, 7))
    for round_ in range(4):
        for n in range(20):
            await at.put("items", item(n, 7, f"{round_}-{n}"))
        deadly.deadly = {f"{round_}-{5 * round_}"}
        assert not await deadly.worker(at, f"w{round_}", lane)
        deadly.deadly = set()
    assert await deadly.worker(at, "last", lane)
    assert await at.log("note") == [f"{round_}-{n}" for round_ in range(4) for n in range(20)]
    assert await at.rows("held") == []
    assert await at.redis.hgetall(f"{at.lanes.prefix}:calls") == {}
