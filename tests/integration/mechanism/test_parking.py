"""Lanes that lag or are paused: their changes wait in Postgres and are applied from there, in order."""

import asyncio
import random
from collections.abc import Mapping

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, Handlers
from worker.draining.drain import Drain
from worker.draining.passes import Pass
from worker.lanes import Backlog, Lane, Top
from worker.reading.journal import LARGE_BYTES
from worker.reading.lagging import Bounds, to_park

WRITE = text("insert into derived_log (handler, position, id, note) values ('one', :position, :id, :note)")


class Shop:
    """A change handler by `grp`, and a derive handler; rows of `bad` fail."""

    def __init__(self) -> None:
        self.bad: set[str] = set()
        self.bad_keys: set[int] = set()
        self.calls: list[list[int]] = []
        self.on = Handlers()

        @self.on.change("items", name="one", lane_key="grp")
        async def one(change: Change, session: AsyncSession) -> None:
            row = change.record or change.old_record
            assert row is not None
            values = {"position": str(change.position), "id": row["id"], "note": row["note"]}
            await session.execute(WRITE, values)
            if row["note"] in self.bad:
                raise ValueError("no")

        @self.on.derive("items", name="sums", by="grp")
        async def sums(groups: list[int], session: AsyncSession) -> None:
            await session.execute(text("select 1"))
            self.calls.append(groups)
            if not self.bad_keys.isdisjoint(groups):
                raise ValueError("no")


@pytest.fixture
def shop() -> Shop:
    return Shop()


async def mark(at: Bench, entries: int) -> None:
    """Have the listener look, with this limit of a lane."""
    bounds = Bounds(10**6, 10**9, entries, handlers=2)

    def choose(backlogs: Mapping[Lane, Backlog], tops: Mapping[Lane, Top]) -> Mapping[Lane, int]:
        return to_park(backlogs, tops, bounds)

    await at.journal.park(choose)


async def pause(at: Bench, name: str, *, paused: bool = True) -> None:
    await at.db.execute("update tailrace.handlers set paused = $2 where name = $1", name, paused)


async def fill(at: Bench, count: int, groups: int = 1) -> None:
    for n in range(count):
        at.take("items", item(n, n % groups, f"{n}"))
    await at.journal.flush()


async def parked(at: Bench, handler: str) -> tuple[int, int]:
    """Return rows that are parked, and changes for which they stand."""
    row = await at.db.fetchrow(
        "select count(*), coalesce(sum(changes), 0)::int from tailrace.held"
        " where status = 'parked' and handler = $1",
        handler,
    )
    assert await at.holding_is_true()
    return row[0], row[1]


async def until_empty(at: Bench, *drains: Drain) -> None:
    await at.settle(*drains)
    assert await at.count("tailrace.held where waits") == 0
    assert await at.holding_is_true()


async def test_a_lane_above_its_limit_is_parked_down_to_half_and_applied_from_there_first(
    at: Bench, shop: Shop
) -> None:
    await at.load(shop.on)
    await fill(at, 300)
    lane = at.lane_of("one", item(0, 0))
    await mark(at, 100)
    drain = at.drain("one")
    while await parked(at, "one") != (250, 250):
        assert (await drain.run(lane)).ended is Pass.MORE
    assert await at.log() == []  # parking calls nobody
    assert (await drain.run(lane)).applied > 0
    await until_empty(at, drain)
    assert await at.log() == list(range(300))


async def test_what_is_parked_is_no_backlog_in_redis(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    await fill(at, 300)
    await pause(at, "one")
    drain = at.drain("one")
    await drain.run(at.lane_of("one", item(0, 0)))
    assert (await at.journal.backlog()).entries == 300  # those of the other handler
    assert await parked(at, "one") == (300, 300)


async def test_a_paused_handler_is_parked_and_goes_on_where_it_was(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    drain = at.drain("one")
    lane = at.lane_of("one", item(0, 0))
    await fill(at, 10)
    await drain.run(lane)
    await pause(at, "one")
    for n in range(10, 1500):
        at.take("items", item(n, 0, f"{n}"))
    await at.journal.flush()
    while (await drain.run(lane)).ended is not Pass.EMPTY:
        pass
    assert await at.log() == list(range(10))
    assert await parked(at, "one") == (1490, 1490)
    await pause(at, "one", paused=False)
    await until_empty(at, drain)
    assert await at.log() == list(range(1500))
    assert (await at.counters())[0] == 1500


async def test_a_paused_handler_retries_nothing(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.bad = {"0"}
    drain = at.drain("one")
    lane = at.lane_of("one", item(0, 0))
    await fill(at, 1)
    await drain.run(lane)
    shop.bad = set()
    await pause(at, "one")
    await at.make_due()
    assert (await drain.run(lane)).ended is Pass.EMPTY
    assert await at.log() == []


async def test_keys_of_a_derive_handler_are_parked_once_each(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    await pause(at, "sums")
    await fill(at, 300, groups=7)
    drain = at.drain("sums")
    for number in range(at.lane_count):
        while (await drain.run(Lane("sums", number))).ended is not Pass.EMPTY:
            pass
    assert await parked(at, "sums") == (7, 300)
    await pause(at, "sums", paused=False)
    await until_empty(at, drain)
    assert sorted(key for call in shop.calls for key in call) == list(range(7))


async def test_what_fails_among_the_parked_holds_back_its_own_key(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.bad = {"4"}
    await pause(at, "one")
    await fill(at, 40, groups=8)
    drain = at.drain("one")
    for number in range(at.lane_count):
        await drain.run(Lane("one", number))
    await pause(at, "one", paused=False)
    for _ in range(3):
        for number in range(at.lane_count):
            await drain.run(Lane("one", number))
    log = await at.log()
    assert sorted(log) == [n for n in range(40) if n % 8 != 4]
    assert await parked(at, "one") == (0, 0)
    assert await at.count("tailrace.held where status = 'retrying'") == 5
    shop.bad = set()
    await until_empty(at, drain)
    assert [n for n in await at.log() if n % 8 == 4] == [4, 12, 20, 28, 36]


async def test_what_is_parked_waits_behind_what_was_held_before(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.bad = {"0"}
    drain = at.drain("one")
    lane = at.lane_of("one", item(0, 0))
    await fill(at, 1)
    await drain.run(lane)
    await pause(at, "one")
    for n in range(1, 9):
        at.take("items", item(n, 0, f"{n}"))
    await at.journal.flush()
    await drain.run(lane)
    await pause(at, "one", paused=False)
    await drain.run(lane)
    assert await at.log() == []
    shop.bad = set()
    await until_empty(at, drain)
    assert await at.log() == list(range(9))


async def test_a_failing_key_of_a_derive_handler_among_the_parked(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    shop.bad_keys = {3}
    await pause(at, "sums")
    await fill(at, 50, groups=5)
    drain = at.drain("sums")
    for number in range(at.lane_count):
        await drain.run(Lane("sums", number))
    await pause(at, "sums", paused=False)
    for _ in range(2):
        for number in range(at.lane_count):
            await drain.run(Lane("sums", number))
    assert await at.rows("held", "id, keys, status, changes, attempts") == [
        (row_id, ['["3"]'], "retrying", 10, 1)
        for row_id in [await at.db.fetchval("select id from tailrace.held")]
    ]
    shop.bad_keys = set()
    await until_empty(at, drain)


async def test_what_goes_to_wait_behind_a_change_that_is_just_being_applied_is_not_forgotten(
    at: Bench, shop: Shop
) -> None:
    await at.load(shop.on)
    ours, theirs = at.groups("one")[:2]
    another = next(n for n in range(ours + 1, 1000) if at.lane_of("one", item(0, n)).number == 0)
    drain, other = at.drain("one"), at.drain("one")
    shop.bad = {"for long", "before"}
    at.take("items", item(0, another, "for long"))
    at.take("items", item(1, theirs, "before"))
    await at.journal.flush()
    for number in range(2):
        await drain.run(Lane("one", number))
    await pause(at, "one")
    await at.put("items", item(2, theirs, "moves"), item(2, ours))
    while await parked(at, "one") != (1, 1):
        for number in range(2):
            await drain.run(Lane("one", number))
    await pause(at, "one", paused=False)
    shop.bad = {"for long"}
    await at.make_due()
    # The one before is applied and what waits for it has been looked for, but not committed, when the other
    # lane, in which the change of both stands, looks for what it has to wait for.
    with at.before_commit(lambda: drain.run(Lane("one", 0))):
        assert (await other.run(Lane("one", 1))).applied == 1
    for number in (0, 1, 0):
        await drain.run(Lane("one", number))
    assert await at.log("note") == ["before", "moves"]
    shop.bad = set()
    await until_empty(at, drain)


async def test_a_parked_change_of_a_lane_over_which_a_worker_died_is_applied_all_the_same(
    at: Bench, shop: Shop
) -> None:
    await at.load(shop.on)
    ours, theirs = at.groups("one")[:2]
    await pause(at, "one")
    await at.put("items", item(1, theirs, "parked"), item(1, ours))
    drain = at.drain("one")
    while await parked(at, "one") != (1, 1):
        for number in range(2):
            await drain.run(Lane("one", number))
    await pause(at, "one", paused=False)
    # The lane is cleared of suspicion when it has met the other one, which has to apply what is parked first.
    await at.put("items", item(1, ours, "met"), item(1, theirs))
    drain.suspect(Lane("one", 1), "the next worker", asyncio.Lock())
    await until_empty(at, drain)
    assert await at.log("note") == ["parked", "met"]


async def test_what_is_due_behind_a_change_that_fails_holds_up_no_other_key(at: Bench, shop: Shop) -> None:
    await at.load(shop.on)
    ours, theirs = at.groups("one")[:2]
    another = next(n for n in range(ours + 1, 1000) if at.lane_of("one", item(0, n)).number == 0)
    drain = at.drain("one")
    shop.bad = {"bad"}
    await at.put("items", item(1, theirs, "bad"))
    await drain.run(Lane("one", 1))
    await pause(at, "one")
    await at.put("items", item(2, theirs, "moves"), item(2, ours))
    await at.put("items", item(3, ours, "behind"))
    while await parked(at, "one") != (2, 2):
        for number in range(2):
            await drain.run(Lane("one", number))
    await pause(at, "one", paused=False)
    await at.put("items", item(4, another, "free"))
    # What is parked of a lane over which a worker has died is due at once, but has to wait all the same.
    drain.suspect(Lane("one", 1), "the next worker", asyncio.Lock())
    for _ in range(6):
        await drain.run(Lane("one", 0))
    assert await at.log("note") == ["free"]
    shop.bad = set()
    await until_empty(at, drain)
    assert await at.log("note") == ["free", "bad", "moves", "behind"]


@pytest.mark.parametrize("seed", range(6))
async def test_random_pauses_failures_moves_and_kills(
    at: Bench, shop: Shop, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every change once, in the order of each key, whatever is parked, failing, moved or killed meanwhile."""
    chance = random.Random(seed)
    # Every other time as if each payload were too large for Redis.
    monkeypatch.setattr("worker.reading.journal.LARGE_BYTES", 0 if seed % 2 else LARGE_BYTES)
    await at.load(shop.on)
    drain = at.drain("one", batch=chance.choice([3, 50]))
    groups: dict[int, int] = {}
    expected: dict[int, list[str]] = {}
    for step in range(160):
        id_ = chance.randrange(12)
        before = groups.get(id_)
        after = chance.randrange(6)
        groups[id_] = after
        note = f"{step}"
        old = None if before is None else item(id_, before)
        at.take("items", item(id_, after, note), old)
        for grp in {after, after if before is None else before}:
            expected.setdefault(grp, []).append(note)
        if chance.random() < 0.1:
            shop.bad.add(note)
        if step % 8 == 7:
            await at.journal.flush()
            await at.journal.sweep()
            if chance.random() < 0.3:
                await pause(at, "one", paused=chance.random() < 0.5)
            if chance.random() < 0.3:
                await mark(at, 2)
            with at.killed_at(chance.randrange(1, 60)):
                for _ in range(chance.randrange(6)):
                    await drain.run(Lane("one", chance.randrange(at.lane_count)))
            if chance.random() < 0.5:
                shop.bad.clear()
                await at.make_due()
    shop.bad.clear()
    await pause(at, "one", paused=False)
    await until_empty(at, drain)
    log = await at.log("note")
    assert sorted(log, key=int) == [f"{step}" for step in range(160)]
    for grp, notes in expected.items():
        assert [note for note in log if note in set(notes)] == notes, grp
    assert (await at.counters())[:2] == (160, 0)


async def test_lanes_that_exchange_rows_are_parked_together(at: Bench, shop: Shop) -> None:
    chance = random.Random(3)
    await at.load(shop.on)
    await pause(at, "one")
    expected: dict[int, list[str]] = {}
    before: int | None = None
    for step in range(300):
        after = chance.randrange(8)
        at.take("items", item(1, after, f"{step}"), None if before is None else item(1, before))
        for grp in {after, after if before is None else before}:
            expected.setdefault(grp, []).append(f"{step}")
        before = after
    await at.journal.flush()
    drain = at.drain("one")
    passes = 0
    while await parked(at, "one") != (300, 300):
        await drain.run(Lane("one", passes % at.lane_count))
        passes += 1
        assert passes < 40  # met one by one, each change would take several
    await pause(at, "one", paused=False)
    passes = 0
    while await at.count("tailrace.held"):
        assert await at.count("tailrace.held where status <> 'parked'") == 0  # where they go one by one
        await drain.run(Lane("one", passes % at.lane_count))
        passes += 1
        assert passes < 40
    assert await at.holding_is_true()
    log = await at.log("note")
    assert sorted(log, key=int) == [f"{step}" for step in range(300)]
    for notes in expected.values():
        assert [note for note in log if note in set(notes)] == notes
