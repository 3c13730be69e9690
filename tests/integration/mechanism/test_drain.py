"""One pass: applied once and in order, with the position, or not at all."""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import Date, bindparam, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, at_once, item
from worker import Change, GiveUp, Handlers, RetryLater
from worker.change import Position
from worker.draining import guard
from worker.draining.passes import Pass
from worker.lanes import Content, Lane, News

WRITE = text("insert into derived_log (handler, position, id, note) values (:handler, :position, :id, :note)")


Fault = Callable[[AsyncSession], Awaitable[None]]


async def write(session: AsyncSession, change: Change, handler: str = "one") -> None:
    row = change.record if change.record is not None else change.old_record
    assert row is not None
    values = {"handler": handler, "position": str(change.position), "id": row["id"], "note": row["note"]}
    await session.execute(WRITE, values)


class Faults:
    """What the handlers of a test do with which rows."""

    def __init__(self) -> None:
        self.by_note: dict[str, Fault | None] = {}
        self.calls: list[Any] = []

    async def meet(self, session: AsyncSession, note: str) -> None:
        self.calls.append(note)
        fault = self.by_note.get(note)
        if fault is not None:
            await fault(session)


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def on(faults: Faults) -> Handlers:
    on = Handlers()

    @on.change("items", name="one", lane_key="grp", timeout=0.5)
    async def one(change: Change, session: AsyncSession) -> None:
        await write(session, change)
        row = change.record or change.old_record
        assert row is not None
        await faults.meet(session, row["note"])

    return on


async def fail(_: AsyncSession) -> None:
    raise ValueError("no")


async def fill(at: Bench, grp: int, ids: range, bad: dict[int, str] | None = None) -> Lane:
    for id_ in ids:
        at.take("items", item(id_, grp, (bad or {}).get(id_, "")))
    await at.journal.flush()
    return at.lane_of("one", item(1, grp))


async def test_applies_once_and_in_order(at: Bench, on: Handlers) -> None:
    await at.load(on)
    lane = await fill(at, 1, range(40))
    drain = at.drain("one")
    assert (await drain.run(lane)).ended is Pass.MORE
    assert (await drain.run(lane)).ended is Pass.EMPTY
    assert (await drain.run(lane)).applied == 0
    assert await at.log() == list(range(40))
    assert await at.counters() == (40, 0, 0)
    assert await at.redis.xlen(at.lanes.key(at.writer.generation, lane)) == 0


@pytest.mark.parametrize(
    "told",
    [[3, 4, 5], [0, 1, 2, 3, 4, 5], [4, 5], [3, 5], [0, 1], []],
    ids=["next", "older too", "gap before", "gap within", "only older", "nothing"],
)
async def test_what_a_bell_tells_is_taken_only_where_it_follows(
    at: Bench, on: Handlers, told: list[int]
) -> None:
    await at.load(on)
    drain = at.drain("one")
    lane = await fill(at, 1, range(3))
    news = list((await at.lanes.read(at.writer.generation, lane, Position.ZERO, 10)).reads)
    await drain.run(lane)
    await fill(at, 1, range(3, 6))
    news += (await at.lanes.read(at.writer.generation, lane, Position.ZERO, 10)).reads
    base = at.lanes.base(at.writer.generation)
    await drain.run(lane, News(base, [news[n] for n in told]))
    assert await at.log() == list(range(6))
    assert await at.counters() == (6, 0, 0)


async def test_what_a_bell_told_of_another_generation_is_not_taken(at: Bench, on: Handlers) -> None:
    await at.load(on)
    drain = at.drain("one")
    lane = await fill(at, 1, range(1))
    found = await at.lanes.read(at.writer.generation, lane, Position.ZERO, 10)
    await at.redis.delete(at.lanes.key(at.writer.generation, lane))
    assert (await drain.run(lane, News(at.lanes.base("another"), found.reads))).applied == 0
    assert (await drain.run(lane, News(at.lanes.base(at.writer.generation), found.reads))).applied == 1


async def test_a_paused_handler_parks_what_a_bell_has_told(at: Bench, on: Handlers) -> None:
    await at.load(on)
    drain = at.drain("one")
    lane = await fill(at, 1, range(2))
    found = await at.lanes.read(at.writer.generation, lane, Position.ZERO, 10)
    await at.db.execute("update tailrace.handlers set paused = true")
    news = News(at.lanes.base(at.writer.generation), found.reads)
    assert (await drain.run(lane, news)).applied == 0
    assert await at.counters() == (0, 2, 0)


async def test_a_pass_that_dies_at_any_statement_leaves_nothing_half(at: Bench, on: Handlers) -> None:
    await at.load(on)
    drain = at.drain("one")
    lane = await fill(at, 1, range(3))
    with at.killed_at(0) as statements:
        await drain.run(lane)
    assert statements[0] == 6  # take, an insert for each change, move, commit
    done = 3
    for step in range(1, statements[0] + 1):
        lane = await fill(at, 1, range(done, done + 3))
        with at.killed_at(step):
            progress = await drain.run(lane)
        assert progress.ended is Pass.AWAY, step
        assert await at.log() == list(range(done)), step
        assert (await drain.run(lane)).applied == 3
        done += 3
        assert await at.log() == list(range(done)), step
    assert await at.counters() == (done, 0, 0)


async def test_a_worker_frozen_within_a_statement_does_not_keep_its_lane(at: Bench, on: Handlers) -> None:
    await at.load(on)
    await at.put("items", item(1, 1))
    lane, drain = at.lane_of("one", item(1, 1)), at.drain("one", idle_ms=100)
    async with at.session() as frozen:
        await frozen.execute("begin; update tailrace.lanes set applied = 77")
        await frozen.prepare("select 1")  # and never runs it: no limit to idleness holds for that
        assert (await drain.run(lane)).ended is Pass.BUSY
        async with asyncio.timeout(60):
            while not (await drain.run(lane)).applied:
                pass
    assert await at.log() == [1]
    assert (await at.counters())[0] == 1


async def test_a_lane_that_another_pass_has_is_busy(at: Bench, on: Handlers, faults: Faults) -> None:
    await at.load(on)
    lane = await fill(at, 1, range(1), {0: "slow"})
    entered, leave = asyncio.Event(), asyncio.Event()

    async def wait(_: AsyncSession) -> None:
        entered.set()
        await leave.wait()

    faults.by_note["slow"] = wait
    first = asyncio.create_task(at.drain("one", timeout=30).run(lane))
    await entered.wait()
    assert (await at.drain("one").run(lane)).ended is Pass.BUSY
    leave.set()
    assert (await first).applied == 1
    assert await at.log() == [0]


async def test_two_drains_at_once_apply_once(at: Bench, on: Handlers) -> None:
    await at.load(on)
    lane = await fill(at, 1, range(200))
    drains = [at.drain("one", batch=7) for _ in range(3)]
    for _ in range(200):
        await at_once(*(lambda drain=drain: drain.run(lane) for drain in drains))
        if (await at.counters())[2] == 0:
            break
    assert await at.log() == list(range(200))


async def test_a_hole_in_a_lane_is_a_recorded_gap_and_the_lane_goes_on(at: Bench, on: Handlers) -> None:
    await at.load(on)
    lane = await fill(at, 1, range(5))
    key = at.lanes.key(at.writer.generation, lane)
    ids = [found[0] for found in await at.redis.xrange(key)]
    await at.redis.xdel(key, ids[1], ids[2])
    await at.drain("one").run(lane)
    assert await at.log() == [0, 3, 4]
    gaps = await at.rows("gaps", "id, cause, tables")
    assert [row[1:] for row in gaps] == [("entries of a lane were lost in Redis", ["public.items"])]


async def test_a_pass_grows_while_it_is_quick_and_shrinks_when_it_is_slow(at: Bench, on: Handlers) -> None:
    await at.load(on)
    drain = at.drain("one", batch=100)
    lane = await fill(at, 1, range(200))

    async def applied(seconds: float, *, full: bool) -> int:
        drain._adapt(seconds, drain._most, full=full)
        most = drain._most
        assert (await drain.run(lane)).applied == most
        drain._most = most
        return most

    assert await applied(0.1, full=True) == 64
    assert await applied(10.0, full=True) == 16
    assert await applied(10.0, full=False) == 4  # also one that was cancelled
    assert await applied(0.1, full=False) == 4  # an empty pass says nothing about the handler
    assert await applied(1.0, full=True) == 4
    drain._most = 64
    drain._adapt(0.1, 64, full=True)
    assert drain._most == 100
    for _ in range(8):  # over as many lanes at once, which had the processor to share
        drain._adapt(10.0, 80, full=True)
    assert drain._most == 20


async def _sql_error(session: AsyncSession) -> None:
    await session.execute(text("select 1 / 0"))


async def _swallowed(session: AsyncSession) -> None:
    with contextlib.suppress(Exception):  # the very mistake this is about
        await session.execute(text("select 1 / 0"))


async def _wrong_type(session: AsyncSession) -> None:
    # Refused by the driver before anything is sent.
    await session.execute(text("select :day").bindparams(bindparam("day", type_=Date)), {"day": "no date"})


async def _deferred(session: AsyncSession) -> None:
    await session.execute(text("insert into derived_children values (1, 404)"))


async def _slow_sql(session: AsyncSession) -> None:
    await session.execute(text("select pg_sleep(10)"))


async def _slow(_: AsyncSession) -> None:
    await asyncio.sleep(10)


async def _exit(_: AsyncSession) -> None:
    raise SystemExit(3)


class _Odd(BaseException):
    pass


async def _odd(_: AsyncSession) -> None:
    raise _Odd


async def _cancelled(_: AsyncSession) -> None:
    raise asyncio.CancelledError


async def _cancels_itself(_: AsyncSession) -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(60)


async def _commits(session: AsyncSession) -> None:
    await session.commit()


async def _never_ends(_: AsyncSession) -> None:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if _released:
                raise


_released: list[bool] = []
FAULTS = [
    fail,
    _sql_error,
    _swallowed,
    _wrong_type,
    _deferred,
    _slow_sql,
    _slow,
    _exit,
    _odd,
    _cancelled,
    _cancels_itself,
    _commits,
    _never_ends,
]


@pytest.fixture
async def _left_behind(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Let what is left behind end with the test."""
    monkeypatch.setattr(guard, "GRACE_SECONDS", 0.2)
    _released.clear()
    yield
    _released.append(True)
    for task in list(guard._left_behind):
        task.cancel()
    await asyncio.gather(*guard._left_behind, return_exceptions=True)


@pytest.mark.usefixtures("_left_behind")
@pytest.mark.parametrize("fault", FAULTS)
async def test_only_the_guilty_wait(at: Bench, on: Handlers, faults: Faults, fault: Fault) -> None:
    await at.load(on)
    faults.by_note["bad"] = fault
    grps = [grp for grp in range(1, 60) if at.lane_of("one", item(1, grp)).number == 0][:3]
    for n, grp in enumerate([*grps, *grps, *grps]):
        at.take("items", item(n, grp, "bad" if n == 1 else ""))
    await at.journal.flush()
    drain, lane = at.drain("one"), Lane("one", 0)
    while (await drain.run(lane)).ended is Pass.MORE:
        pass
    # Of the key of 1, whatever comes later waits behind it; all else is applied in this round.
    assert await at.log() == [0, 2, 3, 5, 6, 8]
    held = await at.db.fetch("select lsn, ordinal, attempts from tailrace.held order by id")
    assert len(held) == 3
    assert [row["attempts"] for row in held][1:] == [0, 0]
    assert await at.holding_is_true()
    assert await at.counters() == (6, 3, 0)
    faults.by_note.clear()
    await at.settle(drain)
    assert (await at.log())[6:] == [1, 4, 7]
    assert await at.counters() == (9, 0, 0)
    assert await at.holding_is_true()


async def test_many_changes_that_take_the_transaction_with_them_end_too(
    at: Bench, on: Handlers, faults: Faults
) -> None:
    await at.load(on)
    faults.by_note["bad"] = _slow_sql
    lane = Lane("one", 0)
    grps = [grp for grp in range(1, 60) if at.lane_of("one", item(1, grp)) == lane][:6]
    for n, grp in enumerate(grps):
        at.take("items", item(n, grp, "bad" if n in (1, 3, 4) else ""))
    await at.journal.flush()
    drain = at.drain("one")
    while (await drain.run(lane)).ended is Pass.MORE:
        pass
    assert await at.log() == [0, 2, 5]
    # Each is called with the whole batch, alone, and in a retry; not once for each of the others.
    assert faults.calls.count("bad") <= 3 * 3


async def test_verdicts(at: Bench, on: Handlers, faults: Faults) -> None:
    await at.load(on)

    async def later(_: AsyncSession) -> None:
        raise RetryLater(3600)

    async def never(_: AsyncSession) -> None:
        raise GiveUp("never")

    faults.by_note |= {"later": later, "never": never}
    lane = await fill(at, 1, range(1), {0: "later"})
    await fill(at, 1, range(1, 2))
    other = next(grp for grp in range(2, 60) if at.lane_of("one", item(1, grp)) == lane)
    await fill(at, other, range(10, 12), {10: "never"})
    drain = at.drain("one")
    assert (await drain.run(lane)).applied == 1
    assert await at.log() == [11]
    found = await at.rows("held", "id, status, next_attempt_at > now() + interval '50 minutes', error")
    assert [row[1:] for row in found] == [
        ("retrying", True, "retry later"),
        ("retrying", None, None),
        ("dead", None, "never"),
    ]
    assert (await drain.run(lane)).applied == 0
    assert await at.holding_is_true()
    assert await at.counters() == (1, 3, 0)


async def test_redis_away_under_a_handler_is_nobodys_fault(at: Bench, on: Handlers, faults: Faults) -> None:
    await at.load(on)

    async def lose_redis(_: AsyncSession) -> None:
        raise RedisConnectionError("away")

    faults.by_note |= {"uses Redis": lose_redis, "bad": fail}
    lane = await fill(at, 1, range(3), {1: "uses Redis"})
    other = next(grp for grp in range(2, 60) if at.lane_of("one", item(1, grp)) == lane)
    drain = at.drain("one", max_attempts=1)
    assert (await drain.run(lane)).ended is Pass.AWAY
    await fill(at, other, range(10, 12), {10: "bad"})
    faults.by_note["uses Redis"] = None
    await drain.run(lane)
    lane = await fill(at, 1, range(20, 22), {20: "uses Redis"})
    faults.by_note["uses Redis"] = lose_redis
    progress = await drain.run(lane)  # with care now, after one that was guilty
    assert (progress.ended, "RedisLost" in progress.reason) == (Pass.AWAY, True)
    faults.by_note["uses Redis"] = None
    await at.settle(drain)
    assert await at.log() == [0, 1, 2, 11, 20, 21]
    assert await at.rows("held", "id, status, attempts, error") == [(1, "dead", 1, "no")]


async def test_what_waits_behind_a_dead_letter_goes_on(at: Bench, on: Handlers, faults: Faults) -> None:
    await at.load(on)
    faults.by_note["bad"] = fail
    lane = await fill(at, 1, range(4), {0: "bad"})
    drain = at.drain("one")
    await drain.run(lane)

    async def never(_: AsyncSession) -> None:
        raise GiveUp("never")

    faults.by_note["bad"] = never
    await at.settle(drain)
    assert await at.log() == [1, 2, 3]
    assert await at.holding_is_true()
    assert await at.counters() == (3, 1, 0)


async def test_what_waited_behind_a_failure_is_applied_together_and_in_order(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine: after a slow pass the next would take less.
    monkeypatch.setattr("worker.draining.drain.SLOW_PASS_SECONDS", 60.0)
    on, calls = Handlers(), []
    bad = {0, 30}

    @on.change("items", name="many", batch=100, lane_key="grp")
    async def many(changes: list[Change], session: AsyncSession) -> None:
        ids = [change.record["id"] for change in changes if change.record is not None]
        calls.append(ids)
        for change in changes:
            await write(session, change, "many")
        if not bad.isdisjoint(ids):
            raise ValueError("one of them")

    await at.load(on)
    for id_ in range(50):
        at.take("items", item(id_, 1))
    await at.journal.flush()
    lane, drain = at.lane_of("many", item(1, 1)), at.drain("many")
    while (await drain.run(lane)).ended is Pass.MORE:
        pass
    assert await at.counters() == (0, 50, 0)
    bad.remove(0)
    calls.clear()
    await at.make_due()
    await drain.run(lane)
    assert await at.log() == list(range(30))
    assert await at.holding_is_true()
    assert await at.counters() == (30, 20, 0)
    assert [len(ids) for ids in calls][:2] == [1, 32]  # what comes first, then as many as a first pass takes
    bad.clear()
    calls.clear()
    await at.settle(drain)
    assert calls == [[30], list(range(31, 50))]
    assert await at.log() == list(range(50))
    assert await at.holding_is_true()
    assert await at.counters() == (50, 0, 0)


async def filled_with_three_keys(at: Bench, handler: str, ids: range) -> Lane:
    """Have changes of three keys wait in one lane, in turn."""
    lane = at.lane_of(handler, item(0, 1))
    grps = [grp for grp in range(1, 60) if at.lane_of(handler, item(0, grp)) == lane][:3]
    for id_ in ids:
        at.take("items", item(id_, grps[id_ % 3]))
    await at.journal.flush()
    return lane


async def test_a_list_is_called_again_without_those_whom_its_errors_are_about(at: Bench) -> None:
    on, calls = Handlers(), list[list[int]]()

    @on.change("items", name="many", batch=100, lane_key="grp")
    async def many(changes: list[Change], session: AsyncSession) -> None:
        calls.append([(change.record or {})["id"] for change in changes])
        for change in changes:
            if (change.record or {})["id"] in (7, 20):
                raise ValueError("no")
        for change in changes:
            await write(session, change, "many")

    await at.load(on)
    lane = await filled_with_three_keys(at, "many", range(30))
    await at.drain("many").run(lane)
    behind = [*range(7, 30, 3), *range(20, 30, 3)]
    innocent = [n for n in range(30) if n not in behind]
    assert sorted(await at.log()) == innocent
    for key in range(3):
        assert [n for n in await at.log() if n % 3 == key] == [n for n in innocent if n % 3 == key]
    # Once without care; then once for each guilty one, once for the others, and each guilty one alone.
    assert len(calls) == 1 + 2 + 1 + 2
    assert calls[-2:] == [[20], [7]]
    assert await at.db.fetchval("select count(*) from tailrace.held") == len(behind)
    assert await at.db.fetchval("select count(*) from tailrace.held where attempts > 0") == 2
    assert await at.holding_is_true()


async def test_an_innocent_one_whom_an_error_is_about_is_applied_in_its_turn(at: Bench) -> None:
    on = Handlers()

    @on.change("items", name="many", batch=100, lane_key="grp")
    async def many(changes: list[Change], session: AsyncSession) -> None:
        trouble = 0
        for change in changes:
            await write(session, change, "many")
            if trouble:
                raise ValueError(f"{trouble} is no good")  # and what is in hand has nothing to do with it
            trouble = 11 if (change.record or {})["id"] == 11 else 0
        if trouble:
            raise ValueError(f"{trouble} is no good")

    await at.load(on)
    lane = await filled_with_three_keys(at, "many", range(30))
    await at.drain("many").run(lane)
    behind = [*range(11, 30, 3)]
    innocent = [n for n in range(30) if n not in behind]
    assert sorted(await at.log()) == innocent
    for key in range(3):
        assert [n for n in await at.log() if n % 3 == key] == [n for n in innocent if n % 3 == key]
    assert await at.db.fetchval("select count(*) from tailrace.held where attempts > 0") == 1
    assert await at.holding_is_true()


async def test_a_key_that_waits_holds_up_no_other_however_much_waits_behind_it(
    at: Bench, on: Handlers, faults: Faults
) -> None:
    await at.load(on)

    async def later(_: AsyncSession) -> None:
        raise RetryLater(3600)

    faults.by_note |= {"later": later, "bad": fail}
    lane = await fill(at, 1, range(300), {0: "later"})
    other = next(grp for grp in range(2, 60) if at.lane_of("one", item(1, grp)) == lane)
    await fill(at, other, range(1000, 1002), {1000: "bad"})
    drain = at.drain("one")
    while (await drain.run(lane)).ended is Pass.MORE:
        pass
    faults.by_note["bad"] = None
    await at.db.execute("update tailrace.held set next_attempt_at = now() where error_class = 'ValueError'")
    await drain.run(lane)
    assert await at.log() == [1000, 1001]


async def test_held_changes_that_become_due_are_found_by_the_sweep(
    at: Bench, on: Handlers, faults: Faults
) -> None:
    await at.load(on)
    faults.by_note["bad"] = fail
    lane = await fill(at, 1, range(3), {0: "bad"})
    drain = at.drain("one")
    await drain.run(lane)
    faults.by_note.clear()
    worker = at.worker("w")
    await at.redis.delete(at.lanes.claims)
    at.enqueued.clear()
    await worker._sweep_once()
    assert at.enqueued == []
    await at.make_due()
    await worker._sweep_once()
    assert at.enqueued == [lane]
    await drain.run(lane)
    assert await at.log() == [0, 1, 2]


async def test_a_change_that_cannot_be_decoded_waits_and_holds_up_no_other_key(
    at: Bench, on: Handlers
) -> None:
    await at.load(on)
    lane = Lane("one", 0)
    grps = [grp for grp in range(1, 60) if at.lane_of("one", item(1, grp)) == lane][:2]
    await fill(at, grps[0], range(1))
    handler = at.handlers[0]
    for payload in (b"{}", b'{"schema":"public","table":"gone","type":"INSERT","columns":[],"record":{}}'):
        key = f'["{grps[1]}"]'.encode()
        at.writer.stage(lane, at.journal._clock.next(), Content((0,), (key,), "realtime", payload, 0.0))
        await at.writer.flush()
    await fill(at, grps[0], range(1, 2))
    await fill(at, grps[1], range(2, 3))
    await at.drain(handler.name).run(lane)
    assert await at.log() == [0, 1]
    assert await at.count("tailrace.held where status = 'retrying'") == 3
    assert await at.holding_is_true()


async def test_a_list_handler_is_taken_apart(at: Bench) -> None:
    on, sizes = Handlers(), []
    bad = {5}

    @on.change("items", name="many", batch=10, lane_key="grp")
    async def many(changes: list[Change], session: AsyncSession) -> None:
        sizes.append(len(changes))
        for change in changes:
            await write(session, change)
        if any(change.record is not None and change.record["id"] in bad for change in changes):
            raise ValueError("one of them")

    await at.load(on)
    grps = [grp for grp in range(1, 200) if at.lane_of("many", item(1, grp)).number == 0][:20]
    for n, grp in enumerate(grps):
        at.take("items", item(n, grp))
    await at.journal.flush()
    drain = at.drain("many")
    await drain.run(Lane("many", 0))
    assert await at.log() == [n for n in range(20) if n != 5]
    assert max(sizes) == 10
    bad.clear()
    await at.settle(drain)
    assert (await at.log())[-1] == 5


class _Keys:
    def __init__(self) -> None:
        self.calls: list[list[Any]] = []
        self.bad: set[Any] = set()

    async def __call__(self, keys: list[Any]) -> None:
        self.calls.append(sorted(keys))
        if not self.bad.isdisjoint(keys):
            raise ValueError("a key")


async def test_a_derive_handler_gets_each_key_once(at: Bench) -> None:
    on, seen = Handlers(), _Keys()

    @on.derive("items", by="grp", name="sums")
    async def sums(keys: list[int], _: AsyncSession) -> None:
        await seen(keys)

    await at.load(on)
    lane = Lane("sums", 0)
    a, b, c = [grp for grp in range(1, 99) if at.lane_of("sums", item(1, grp)) == lane][:3]
    for n in range(10):
        at.take("items", item(n, (a, b)[n % 2]))
    at.take("items", item(0, c), item(0, a))
    at.take("items", item(0, None), item(0, c))
    await at.journal.flush()
    drain = at.drain("sums")
    assert (await drain.run(lane)).applied == 12
    assert seen.calls == [sorted([a, b, c])]
    # A held key stands for later changes; the others go on.
    seen.calls.clear()
    seen.bad = {a}
    for grp in (a, b, a):
        at.take("items", item(1, grp))
    await at.journal.flush()
    assert (await drain.run(lane)).applied == 1
    assert await at.counters() == (13, 2, 0)
    at.take("items", item(1, b), item(1, a))
    await at.journal.flush()
    await drain.run(lane)
    assert await at.counters() == (13, 3, 0)
    assert await at.holding_is_true()
    seen.calls.clear()
    seen.bad.clear()
    await at.settle(drain)
    assert seen.calls == [[a]]
    assert await at.counters() == (16, 0, 0)
    # What failed once is not remembered against the key.
    seen.bad = {b}
    for grp in (a, b):
        at.take("items", item(1, grp))
    await at.journal.flush()
    assert (await drain.run(lane)).applied == 1


async def test_derive_keys_that_take_the_transaction_with_them(at: Bench) -> None:
    on, bad, done = Handlers(), set[int](), list[int]()

    @on.derive("items", by="grp", name="sums", timeout=0.5)
    async def sums(keys: list[int], session: AsyncSession) -> None:
        if not bad.isdisjoint(keys):
            await session.execute(text("select pg_sleep(5)"))
        done.extend(keys)

    await at.load(on)
    lane = Lane("sums", 0)
    grps = [grp for grp in range(1, 99) if at.lane_of("sums", item(1, grp)) == lane][:6]
    bad |= {grps[1], grps[3]}
    for grp in grps:
        at.take("items", item(1, grp))
    await at.journal.flush()
    drain = at.drain("sums")
    for _ in range(10):
        await drain.run(lane)
        if set(done) == set(grps) - bad:
            break
    assert set(done) == set(grps) - bad
    assert await at.holding_is_true()
    bad.clear()
    await at.settle(drain)
    assert set(done) == set(grps)
    assert await at.counters() == (6, 0, 0)


async def test_composite_and_typed_keys(at: Bench) -> None:
    on, seen = Handlers(), list[Any]()

    @on.derive("pairs", name="pairs")
    async def pairs(keys: list[tuple[int, uuid.UUID]], _: AsyncSession) -> None:
        seen.extend(keys)

    await at.load(on)
    one = uuid.uuid4()
    row = {"a": 7, "b": str(one).upper(), "amount": "1.50"}
    await at.put("pairs", row)
    await at.put("pairs", row | {"b": str(one)}, row)
    await at.settle(at.drain("pairs"))
    assert set(seen) == {(7, one)}
