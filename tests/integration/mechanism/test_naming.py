"""Handlers of lists that name what has failed: the rest of the call counts, and each key keeps its order."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from tests.integration.mechanism.test_drain import write
from worker import Change, Context, GiveUp, Handlers, RetryLater
from worker.draining.drain import Drain
from worker.draining.passes import Pass
from worker.errors import RedisLost
from worker.lanes import Lane


class Picky:
    """What a handler of lists does with which notes, and with what it was called."""

    def __init__(self, *, asks: bool) -> None:
        self.errors: dict[str, Callable[[], Exception]] = {}
        self.asks = asks
        self.calls: list[list[int]] = []

    async def __call__(self, changes: list[Change], session: AsyncSession, context: Context) -> None:
        self.calls.append([change.record["id"] for change in changes if change.record is not None])
        for change in changes:
            if self.asks and context.is_held(change):
                continue
            assert change.record is not None
            error = self.errors.get(change.record["note"])
            if error is None:
                await write(session, change)
            else:
                context.fail(change, error())


@pytest.fixture(params=[True, False], ids=["asks", "does not ask"])
def picky(request: pytest.FixtureRequest) -> Picky:
    return Picky(asks=request.param)


async def load(at: Bench, picky: Picky, *, after: Any = "continue") -> list[int]:
    """Let it be a handler; returns groups that are keys of its first lane."""
    on = Handlers()

    @on.change("items", name="many", batch=20, lane_key="grp", after=after)
    async def many(changes: list[Change], session: AsyncSession, context: Context) -> None:
        await picky(changes, session, context)

    await at.load(on)
    return [grp for grp in range(1, 200) if at.lane_of("many", item(1, grp)).number == 0][:5]


async def run(at: Bench, drain: Drain, *rows: dict[str, Any]) -> None:
    for row in rows:
        at.take("items", row)
    await at.journal.flush()
    await drain.run(Lane("many", 0))


async def test_what_is_named_waits_and_the_rest_of_the_call_counts(at: Bench, picky: Picky) -> None:
    a, b, *_ = await load(at, picky)
    picky.errors["bad"] = lambda: ValueError("this one")
    drain = at.drain("many")
    rows = [item(1, a), item(2, a, "bad"), item(3, b), item(4, a), item(5, b), item(6, a)]
    await run(at, drain, *rows)
    assert await at.log() == [1, 3, 5]
    # Where it cannot be known whether it has written for what comes after, it is called once more without.
    again = [] if picky.asks else [[1, 2, 3, 4, 5, 6], [1, 3, 5]]
    assert picky.calls == [[1, 2, 3, 4, 5, 6], *again]
    assert await at.rows("held", "id, lsn is not null, attempts, error, status") == [
        (1, True, 1, "this one", "retrying"),
        (2, True, 0, None, "retrying"),
        (3, True, 0, None, "retrying"),
    ]
    assert await at.holding_is_true()
    picky.errors.clear()
    await at.settle(drain)
    assert await at.log() == [1, 3, 5, 2, 4, 6]
    assert await at.counters() == (6, 0, 0)


async def test_verdicts_mean_what_they_mean_when_they_are_raised(at: Bench, picky: Picky) -> None:
    a, b, c, *_ = await load(at, picky)
    picky.errors |= {"never": lambda: GiveUp("no use"), "later": lambda: RetryLater(60, "not yet")}
    drain = at.drain("many")
    await run(at, drain, item(1, a, "never"), item(2, b, "later"), item(3, a), item(4, b), item(5, c))
    # What is given up holds nothing back.
    assert await at.log() == [3, 5]
    assert await at.rows("held", "id, attempts, status, error_class, error, overtaken_by") == [
        (1, 1, "dead", "worker.errors.GiveUp", "no use", 1),
        (2, 0, "retrying", "worker.errors.RetryLater", "not yet", 0),
        (3, 0, "retrying", None, None, 0),
    ]
    assert picky.calls[0] == [1, 2, 3, 4, 5]


async def test_a_dead_letter_that_halts_holds_its_key_back(at: Bench, picky: Picky) -> None:
    a, b, *_ = await load(at, picky, after="halt")
    picky.errors["never"] = lambda: GiveUp("no use")
    await run(at, at.drain("many"), item(1, a, "never"), item(2, a), item(3, b))
    assert await at.log() == [3]
    assert await at.rows("held", "id, status") == [(1, "dead"), (2, "retrying")]


async def test_what_is_due_is_called_again_together_and_named_again(at: Bench, picky: Picky) -> None:
    groups = await load(at, picky)
    picky.errors["bad"] = lambda: ValueError("this one")
    drain = at.drain("many", max_attempts=2)
    await run(at, drain, *(item(n, grp, "bad") for n, grp in enumerate(groups)))
    assert await at.log() == []
    picky.calls.clear()
    await at.make_due()
    picky.errors["bad"] = lambda: ValueError("still this one")
    await drain.run(Lane("many", 0))
    assert picky.calls == [[0, 1, 2, 3, 4]]
    found = await at.rows("held", "id, attempts, status, error")
    assert [row[1:] for row in found] == [(2, "dead", "still this one")] * 5
    assert await at.holding_is_true()


async def test_of_what_is_called_again_together_only_what_is_named_stays(at: Bench, picky: Picky) -> None:
    groups = await load(at, picky)
    picky.errors |= {"bad": lambda: ValueError("x"), "worse": lambda: ValueError("y")}
    drain = at.drain("many")
    await run(at, drain, *(item(n, grp, ("bad", "worse")[n % 2]) for n, grp in enumerate(groups)))
    del picky.errors["bad"]
    await at.make_due()
    await drain.run(Lane("many", 0))
    assert await at.log() == [0, 2, 4]
    assert [row[1:] for row in await at.rows("held", "id, attempts")] == [(2,), (2,)]


async def test_where_nobody_is_to_blame_the_lane_waits(at: Bench, picky: Picky) -> None:
    a, b, *_ = await load(at, picky)
    picky.errors["away"] = lambda: RedisLost("it went away")
    drain = at.drain("many")
    at.take("items", item(1, a))
    at.take("items", item(2, b, "away"))
    await at.journal.flush()
    assert (await drain.run(Lane("many", 0))).ended is Pass.AWAY
    assert await at.log() == []
    assert await at.count("tailrace.held") == 0
    picky.errors.clear()
    await drain.run(Lane("many", 0))
    assert await at.log() == [1, 2]


async def test_a_derive_handler_names_keys(at: Bench) -> None:
    on, calls, bad = Handlers(), list[list[int]](), set[int]()

    @on.derive("items", by="grp", name="sums")
    async def sums(keys: list[int], session: AsyncSession, context: Context) -> None:
        calls.append(sorted(keys))
        for key in keys:
            if key in bad:
                context.fail(key, ValueError("a key"))

    await at.load(on)
    lane = Lane("sums", 0)
    a, b, c = [grp for grp in range(1, 99) if at.lane_of("sums", item(1, grp)) == lane][:3]
    bad.add(b)
    for n, grp in enumerate((a, b, c, b)):
        at.take("items", item(n, grp))
    await at.journal.flush()
    drain = at.drain("sums")
    assert (await drain.run(lane)).applied == 2
    assert calls == [[a, b, c]]
    assert await at.rows("held", "id, changes, attempts, error") == [(1, 2, 1, "a key")]
    bad.clear()
    await at.settle(drain)
    assert calls[1:] == [[b]]
    assert await at.counters() == (4, 0, 0)


async def test_for_one_change_it_is_the_same_as_to_raise(at: Bench) -> None:
    on = Handlers()

    @on.change("items", name="one", lane_key="grp")
    async def one(change: Change, session: AsyncSession, context: Context) -> None:
        assert not context.is_held(change)
        await write(session, change)
        assert change.record is not None
        if change.record["note"] == "bad":
            context.fail(change, ValueError("this one"))

    await at.load(on)
    grp = at.groups("one")[0]
    for n, note in enumerate(("", "bad", "")):
        at.take("items", item(n, grp, note))
    await at.journal.flush()
    await at.drain("one").run(Lane("one", 0))
    assert await at.log() == [0]
    assert await at.rows("held", "id, attempts, error") == [(1, 1, "this one"), (2, 0, None)]


async def test_what_was_not_given_cannot_be_named_nor_can_anything_later(at: Bench) -> None:
    on, kept = Handlers(), list[tuple[Context, Change]]()

    @on.change("items", name="many", batch=5, lane_key="grp")
    async def many(changes: list[Change], _: AsyncSession, context: Context) -> None:
        if kept:
            context.fail(kept[0][1], ValueError("of another call"))
        kept.append((context, changes[0]))

    await at.load(on)
    grp, lane = at.groups("many")[0], Lane("many", 0)
    drain = at.drain("many")
    await at.put("items", item(1, grp))
    await drain.run(lane)
    context, change = kept[0]
    with pytest.raises(LookupError, match="over"):
        context.fail(change, ValueError("too late"))
    await at.put("items", item(2, grp))
    await drain.run(lane)
    ((error_class, error),) = await at.rows("held", "error_class, error")
    assert error_class == "ValueError"
    assert "was not given" in error


class Unsteady:
    """Fails at some changes for some attempts, in ways that a seed chooses."""

    def __init__(self, chance: random.Random, *, asks: bool) -> None:
        self._chance = chance
        self._asks = asks
        self.faults = {n: chance.choice(["name", "raise", "give up"]) for n in range(0, 120, 5)}
        self._left = {n: chance.randint(1, 3) for n in self.faults}

    async def __call__(self, changes: list[Change], session: AsyncSession, context: Context) -> None:
        backwards = not self._asks and self._chance.random() < 0.3
        for change in reversed(changes) if backwards else changes:
            if not (self._asks and context.is_held(change)):
                self._look_at(change, context)
        for change in changes:
            if not context.is_held(change) and not self._fails(change):
                await write(session, change)

    def _fails(self, change: Change) -> bool:
        assert change.record is not None
        return self._left.get(change.record["id"], 0) >= change.attempt

    def _look_at(self, change: Change, context: Context) -> None:
        if not self._fails(change):
            return
        assert change.record is not None
        fault = self.faults[change.record["id"]]
        if fault == "raise":
            raise ValueError(fault)
        context.fail(change, ValueError(fault) if fault == "name" else GiveUp("no use"))


@pytest.mark.parametrize("seed", range(4))
async def test_any_mixture_of_names_and_errors_keeps_the_order_of_each_key(at: Bench, seed: int) -> None:
    chance, on = random.Random(seed), Handlers()
    unsteady = Unsteady(chance, asks=seed % 2 == 0)

    @on.change("items", name="many", batch=chance.randint(2, 30), lane_key="grp")
    async def many(changes: list[Change], session: AsyncSession, context: Context) -> None:
        await unsteady(changes, session, context)

    await at.load(on)
    drain, groups = at.drain("many", batch=chance.randint(5, 60)), [*at.groups("many"), 901, 902, 903]
    grp_of = {n: chance.choice(groups) for n in range(120)}
    for n, grp in grp_of.items():
        at.take("items", item(n, grp))
        if chance.random() < 0.1:
            await at.journal.flush()
            await drain.run(Lane("many", chance.randrange(at.lane_count)))
    await at.journal.flush()
    await at.settle(drain)
    dead = {n for n, fault in unsteady.faults.items() if fault == "give up"}
    log = await at.log()
    assert sorted(log) == sorted(grp_of.keys() - dead)
    for grp in groups:
        of_key = [n for n in log if grp_of[n] == grp]
        assert of_key == sorted(of_key)
    assert await at.counters() == (120 - len(dead), len(dead), 0)
    assert await at.holding_is_true()


async def test_a_transaction_over_several_lanes_is_left_to_their_own_passes(at: Bench, picky: Picky) -> None:
    await load(at, picky)
    picky.errors["bad"] = lambda: ValueError("this one")
    drain = at.drain("many")
    for number, grp in enumerate(at.groups("many")[:3]):
        at.take("items", item(number, grp, "bad" if number == 1 else ""))
    await at.journal.flush()
    news = await at.told("many", range(3))
    assert (await drain.run_several(news)).lanes == {}
    assert await at.log() == []
    for lane, what in news.items():
        await drain.run(lane, what)
    assert await at.log() == [0, 2]
    assert await at.rows("held", "lanes, error") == [([1], "this one")]
    assert await at.holding_is_true()
