"""What a pass stands on: transactions that are seen, the same server, fixed lanes, one lock for a key."""

import asyncio
from dataclasses import dataclass, field

import asyncpg
import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item, raw_change
from worker import Change, Handlers
from worker.change import Position
from worker.draining.passes import Pass
from worker.reading import layout

SUM = text(
    "insert into derived_sums select :grp, coalesce(sum(id), 0) from items where grp = :grp"
    " on conflict (grp) do update set total = excluded.total"
)


@pytest.fixture
def on() -> Handlers:
    on = Handlers()

    @on.change("items", name="one", lane_key="grp")
    async def one(change: Change, session: AsyncSession) -> None:
        assert change.record is not None
        await session.execute(text("insert into derived_log (id) values (:id)"), {"id": change.record["id"]})

    return on


async def test_a_change_that_is_decoded_before_it_can_be_seen_waits(at: Bench, on: Handlers) -> None:
    await at.load(on)
    lane, drain = at.lane_of("one", item(1, 1)), at.drain("one")
    other = await asyncpg.connect(at.engine.url.render_as_string(hide_password=False).replace("+asyncpg", ""))
    try:
        await other.execute("begin; insert into items values (2, 1)")
        xid = int(await other.fetchval("select pg_current_xact_id()::text")) % 2**32
        await at.put("items", item(1, 1))
        raw = msgspec.structs.replace(raw_change("items", item(2, 1), None), xid=xid)
        at.journal.add(raw, at.router.route(raw).matched, 1.0)
        await at.put("items", item(3, 1))
        first = await drain.run(lane)
        assert (first.applied, first.ended) == (1, Pass.SOON), "it is looked at again in a moment"
        assert (await drain.run(lane)).ended is Pass.SOON
        assert await at.log() == [1], "what comes later does not overtake it"
        await other.execute("commit")
    finally:
        await other.close()
    await at.settle(drain)
    assert await at.log() == [1, 2, 3]


async def test_whether_a_transaction_can_be_seen_costs_no_statement_where_it_had_ended(
    at: Bench, on: Handlers
) -> None:
    await at.load(on)
    lane, drain = at.lane_of("one", item(1, 1)), at.drain("one")
    xid = int(await at.db.fetchval("select pg_current_xact_id()::text")) % 2**32
    statements = []
    for id_, source in ((1, None), (2, None), (3, xid)):
        raw = msgspec.structs.replace(raw_change("items", item(id_, 1), None), xid=source)
        at.journal.add(raw, at.router.route(raw).matched, 1.0)
        await at.journal.flush()
        with at.killed_at(0) as seen:
            assert (await drain.run(lane)).applied == 1
        statements.append(seen[0])
    assert statements[2] == statements[1]


@pytest.mark.parametrize(
    "difference", ["server_started = server_started - interval '1 s'", "timeline = timeline + 1"]
)
async def test_nothing_is_applied_on_another_server_than_the_generation_began_on(
    at: Bench, on: Handlers, difference: str
) -> None:
    await at.load(on)
    await at.db.execute(
        "update tailrace.source set delivery = 'proven', server_started = pg_postmaster_start_time(),"
        " timeline = (select timeline_id from pg_control_checkpoint())"
    )
    lane, drain = at.lane_of("one", item(1, 1)), at.drain("one")
    await at.put("items", item(1, 1))
    await at.db.execute(f"update tailrace.source set {difference}")
    assert (await drain.run(lane)).ended is Pass.AWAY
    assert await at.log() == []
    await at.db.execute(
        "update tailrace.source set server_started = pg_postmaster_start_time(),"
        " timeline = (select timeline_id from pg_control_checkpoint())"
    )
    await at.settle(drain)
    assert await at.log() == [1]


async def test_the_number_of_lanes_changes_only_when_nothing_is_under_way(at: Bench, on: Handlers) -> None:
    await at.load(on)

    async def agree(*, settled: bool) -> int:
        async with at.engine.begin() as connection:
            present = Position(50, -1)
            return await layout.agree(connection, at.handlers, 8, present, resumed=present, settled=settled)

    assert await agree(settled=False) == 4
    assert await at.count("tailrace.lanes") == 4
    assert await agree(settled=True) == 8
    assert await at.count("tailrace.lanes") == 8


async def test_a_handler_that_is_gone_is_orphaned_and_one_that_comes_back_has_a_gap(
    at: Bench, on: Handlers
) -> None:
    await at.load(on)
    for handlers in ((), at.handlers):
        async with at.engine.begin() as connection:
            present = Position(2**50, -1)
            await layout.agree(connection, handlers, 4, present, resumed=present, settled=True)
        state = await at.db.fetchval("select state from tailrace.handlers")
        assert state == ("active" if handlers else "orphaned")
        assert await at.count("tailrace.gaps") == (1 if handlers else 0)
    assert await at.count(f"tailrace.lanes where (lsn, ordinal) = ({2**50}, -1)") == 4


@dataclass
class Slow:
    """A derive handler that stops once, between what it reads and its commit."""

    read: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)


async def test_a_backfill_beside_the_drain_computes_no_key_at_the_same_time(at: Bench) -> None:
    await at.db.execute("create table derived_sums (grp integer primary key, total integer)")
    await at.db.execute("insert into items values (1, 1)")
    slow, on = Slow(), Handlers()

    @on.derive("items", by="grp", name="sums", timeout=30)
    async def sums(keys: list[int], session: AsyncSession) -> None:
        for grp in keys:
            await session.execute(SUM, {"grp": grp})
        slow.read.set()
        await slow.go_on.wait()

    await at.load(on)
    lane = at.lane_of("sums", item(1, 1))
    await at.put("items", item(1, 1))
    async with asyncio.timeout(30):
        first = asyncio.create_task(at.drain("sums").run(lane), name="test: slow pass")
        await slow.read.wait()
        await at.db.execute("insert into items values (2, 1)")
        await at.journal.put_keys(at.handlers[0], [b'["1"]'])
        assert (await at.drain("sums").run(lane)).ended is Pass.BUSY
        slow.go_on.set()
        assert (await first).applied == 1
    await at.settle(at.drain("sums"))
    assert await at.db.fetchval("select total from derived_sums where grp = 1") == 3
