"""When a change is given up, and what that means for the changes after it."""

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, GiveUp, Handlers, RetryLater
from worker.draining.drain import Drain
from worker.lanes import Lane

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
