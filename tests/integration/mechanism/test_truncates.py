"""TRUNCATE: derive handlers compute the keys that they keep, each lane its own; change handlers meet."""

import json

import pytest
from sqlalchemy import column, select, table, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import COLUMNS, Bench, bench, item
from tests.stack import Servers
from worker import Change, GiveUp, Handlers
from worker.change import RawChange
from worker.lanes import Lane

KEPT = select(column("grp")).select_from(table("derived_kept"))


class Shop:
    """A derive handler that keeps keys, and a change handler; rows and keys of `bad` fail."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.hopeless: set[str] = set()
        self.bad_keys: set[int] = set()
        self.calls: list[list[int]] = []
        self.on = Handlers()

        @self.on.derive("items", name="sums", by="grp", all_keys=KEPT)
        async def sums(groups: list[int], session: AsyncSession) -> None:
            self.calls.append(groups)
            await session.execute(text("select 1"))
            if not self.bad_keys.isdisjoint(groups):
                raise ValueError("no")

        @self.on.change("items", name="one", types=["INSERT", "UPDATE", "TRUNCATE"])
        async def one(change: Change, session: AsyncSession) -> None:
            row = change.record
            note = row["note"] if row is not None else change.type
            await session.execute(
                text("insert into derived_log (position, id, note) values (:position, :id, :note)"),
                {"position": str(change.position), "id": row["id"] if row is not None else 0, "note": note},
            )
            if note in self.hopeless:
                raise GiveUp("no")
            if note in self.bad:
                raise ValueError("no")

    def computed(self) -> list[int]:
        """Give the keys that were computed, and forget them."""
        found = sorted(key for call in self.calls for key in call)
        self.calls = []
        return found


@pytest.fixture
async def shop(at: Bench) -> Shop:
    await at.db.execute("create table derived_kept (grp int)")
    made = Shop()
    await at.load(made.on)
    return made


def truncate(at: Bench) -> None:
    columns = [{"name": name, "type": type_} for name, type_ in COLUMNS["items"].items()]
    data = {"schema": "public", "table": "items", "type": "TRUNCATE", "columns": columns}
    raw = RawChange.decode("realtime", json.dumps(data).encode())
    routes = at.router.route(raw)
    assert not routes.unroutable
    at.journal.add(raw, routes.matched, 0.0)


async def test_each_lane_computes_the_kept_keys_that_are_its_own(at: Bench, shop: Shop) -> None:
    await at.db.execute("insert into derived_kept select generate_series(1, 50)")
    truncate(at)
    await at.journal.flush()
    drain = at.drain("sums")
    for number in range(at.lane_count):
        shop.calls = []
        await drain.run(Lane("sums", number))
        lanes = {at.lane_of("sums", item(1, key)).number for call in shop.calls for key in call}
        assert lanes == {number}
    assert await at.count("derived_kept") == 50
    shop.calls = []
    truncate(at)
    at.take("items", item(1, 60))
    await at.journal.flush()
    await at.settle(drain)
    assert shop.computed() == [*range(1, 51), 60]
    assert await at.count("tailrace.gaps") == 0
    assert (await at.db.fetchval("select sum(read) - sum(applied) from tailrace.lanes")) == 0


async def test_a_handler_that_keeps_nothing_yet_passes(at: Bench, shop: Shop) -> None:
    truncate(at)
    await at.journal.flush()
    await at.settle(at.drain("sums"))
    assert shop.computed() == []
    row = await at.db.fetchrow("select sum(read), sum(applied) from tailrace.lanes where handler = 'sums'")
    assert tuple(row) == (1, 1)


async def test_keys_that_fail_are_held_and_no_others(at: Bench, shop: Shop) -> None:
    await at.db.execute("insert into derived_kept select generate_series(1, 20)")
    shop.bad_keys = {7}
    truncate(at)
    await at.journal.flush()
    drain = at.drain("sums")
    for number in range(at.lane_count):
        await drain.run(Lane("sums", number))
    assert [row[0] for row in await at.rows("held", "keys")] == [['["7"]']]
    shop.computed()
    shop.bad_keys = set()
    await at.settle(drain)
    assert shop.computed() == [7]
    assert await at.holding_is_true()


async def test_keys_that_cannot_be_read_are_a_gap(at: Bench, shop: Shop) -> None:
    await at.db.execute("drop table derived_kept")
    truncate(at)
    at.take("items", item(1, 60))
    await at.journal.flush()
    await at.settle(at.drain("sums"))
    assert shop.computed() == [60]
    causes = {row[0] for row in await at.rows("gaps", "cause")}
    assert causes == {"the keys that sums keeps could not be read for a TRUNCATE"}


async def test_parked_lanes_keep_the_keys_of_a_truncate(at: Bench, shop: Shop) -> None:
    await at.db.execute("insert into derived_kept select generate_series(1, 20)")
    await at.db.execute("update tailrace.handlers set paused = true")
    truncate(at)
    await at.journal.flush()
    drain = at.drain("sums")
    for number in range(at.lane_count):
        await drain.run(Lane("sums", number))
    assert shop.computed() == []
    await at.db.execute("update tailrace.handlers set paused = false")
    await at.settle(drain)
    assert shop.computed() == list(range(1, 21))
    assert await at.holding_is_true()


# Change handlers: a meeting of all lanes, in order with everything.


async def test_a_truncate_comes_after_all_before_it_and_before_all_after_it(at: Bench, shop: Shop) -> None:
    for n in range(12):
        at.take("items", item(n, n, f"before {n}"))
    truncate(at)
    for n in range(12):
        at.take("items", item(n, n, f"after {n}"))
    await at.journal.flush()
    await at.settle(at.drain("one"))
    kinds = [note.split()[0] for note in await at.log("note")]
    assert kinds == ["before"] * 12 + ["TRUNCATE"] + ["after"] * 12


async def pass_all(at: Bench, *, times: int = 4) -> None:
    """Let every lane have passes, without letting the time of retries come."""
    drain = at.drain("one")
    for _ in range(times):
        for number in range(at.lane_count):
            await drain.run(Lane("one", number))


async def test_it_waits_for_what_is_held_and_everything_waits_for_it(at: Bench, shop: Shop) -> None:
    shop.bad = {"bad"}
    for n in range(8):
        at.take("items", item(n, n, "bad" if n == 3 else f"before {n}"))
    truncate(at)
    for n in range(8):
        at.take("items", item(n, n, f"after {n}"))
    await at.journal.flush()
    await pass_all(at)
    assert sorted(await at.log("note")) == [f"before {n}" for n in range(8) if n != 3]
    assert await at.count("tailrace.held") == 10
    assert await at.holding_is_true()
    # More comes while it waits: of a key that nothing is held of.
    await at.put("items", item(99, 99, "after 99"))
    await pass_all(at)
    assert "after 99" not in await at.log("note")
    shop.bad = set()
    await at.settle(at.drain("one"))
    log = await at.log("note")
    assert log[7:9] == ["bad", "TRUNCATE"]
    assert len(log) == 18
    assert sorted(log[9:]) == sorted([*(f"after {n}" for n in range(8)), "after 99"])
    assert await at.holding_is_true()


async def test_a_truncate_that_fails_holds_up_all_keys_until_it_is_applied(at: Bench, shop: Shop) -> None:
    shop.bad = {"TRUNCATE"}
    at.take("items", item(1, 1, "before"))
    truncate(at)
    at.take("items", item(1, 1, "after"))
    at.take("items", item(2, 2, "another key"))
    await at.journal.flush()
    await pass_all(at)
    assert await at.log("note") == ["before"]
    shop.bad = set()
    await at.settle(at.drain("one"))
    log = await at.log("note")
    assert log[:2] == ["before", "TRUNCATE"]
    assert sorted(log[2:]) == ["after", "another key"]


async def test_a_truncate_that_is_given_up_lets_the_others_go(at: Bench, shop: Shop) -> None:
    shop.bad = {"before"}
    shop.hopeless = {"TRUNCATE"}
    at.take("items", item(1, 1, "before"))
    truncate(at)
    at.take("items", item(1, 1, "after"))
    await at.journal.flush()
    await pass_all(at)
    assert await at.log("note") == []
    shop.bad = set()
    await at.settle(at.drain("one"))
    assert await at.log("note") == ["before", "after"]
    assert await at.db.fetchval("select status from tailrace.held") == "dead"
    assert await at.holding_is_true()


async def test_parked_changes_keep_the_order_around_a_truncate(at: Bench, shop: Shop) -> None:
    await at.db.execute("update tailrace.handlers set paused = true")
    for n in range(6):
        at.take("items", item(n, n, f"before {n}"))
    truncate(at)
    for n in range(6):
        at.take("items", item(n, n, f"after {n}"))
    await at.journal.flush()
    await pass_all(at)
    assert await at.log("note") == []
    assert await at.holding_is_true()
    await at.db.execute("update tailrace.handlers set paused = false")
    await at.settle(at.drain("one"))
    kinds = [note.split()[0] for note in await at.log("note")]
    assert kinds == ["before"] * 6 + ["TRUNCATE"] + ["after"] * 6
    assert await at.holding_is_true()


async def test_with_one_lane_the_order_is_the_same(shared: Servers) -> None:
    shop = Shop()
    async with bench(shared, lanes=1) as at:
        await at.load(shop.on)
        shop.bad = {"bad"}
        at.take("items", item(1, 1, "bad"))
        at.take("items", item(2, 2, "before"))
        truncate(at)
        at.take("items", item(2, 2, "after"))
        await at.journal.flush()
        await pass_all(at)
        assert await at.log("note") == ["before"]
        shop.bad = set()
        await at.settle(at.drain("one"))
        assert await at.log("note") == ["before", "bad", "TRUNCATE", "after"]
