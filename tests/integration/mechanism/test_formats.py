"""What a newer version writes: an older one waits with it, and neither loses nor doubles it."""

import asyncio

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench, item
from worker import Change, Handlers, lane_scripts, lanes, lease
from worker.draining.passes import Pass
from worker.errors import NewerFormat
from worker.lanes import FORMATS, Entry, LeaseLostError

on = Handlers()


@on.change("items", name="log")
async def log(change: Change, session: AsyncSession) -> None:
    assert change.record is not None
    connection = await session.connection()
    await connection.exec_driver_sql(
        "insert into derived_log (handler, id) values ('log', $1)", (change.record["id"],)
    )


class LongerEntry(Entry, frozen=True, array_like=True):
    """An entry with a member that older versions may overlook."""

    colour: str = "green"


def write_as_newer(at: Bench, field: str = "e2") -> None:
    at.lanes.add_script = at.redis.register_script(lane_scripts.ADD.replace("'e'", f"'{field}'"))


async def test_what_stands_before_an_entry_of_a_newer_format_is_applied_and_that_one_waits(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await at.load(on)
    drain, lane = at.drain("log"), at.lane_of("log", item(1, 1))
    for note in "ab":
        await at.put("items", item(1, 1, note))
    write_as_newer(at)
    await at.put("items", item(1, 1, "c"))
    write_as_newer(at, "e")
    await at.put("items", item(1, 1, "d"))
    assert (await drain.run(lane)).applied == 2
    for _ in range(3):
        waits = await drain.run(lane)
        assert (waits.ended, waits.applied, waits.parked) == (Pass.NEWER, 0, {})
    assert "of format 'e2'" in waits.reason
    assert "upgrade this process" in waits.reason
    assert await at.counters() == (2, 0, 2)
    assert await at.count("tailrace.gaps") == 0
    monkeypatch.setitem(FORMATS, b"e2", FORMATS[b"e"])  # the worker is upgraded
    await at.settle(drain)
    assert await at.counters() == (4, 0, 0)
    assert await at.log() == [1] * 4


async def test_what_a_newer_version_adds_to_an_entry_is_passed_over(at: Bench) -> None:
    entry = Entry("1-0", (0,), (b"k",), "wal", b"", 1, 10, 1.0)
    longer = LongerEntry("1-0", (0,), (b"k",), "wal", b"", 1, 10, 1.0)
    assert FORMATS[b"e"](msgspec.msgpack.encode(longer)) == entry


async def test_counts_that_a_newer_version_has_more_of_are_passed_over(at: Bench) -> None:
    await at.load(on)
    await at.put("items", item(1, 1))
    generation, lane = at.writer.generation, at.lane_of("log", item(1, 1))
    base = at.lanes.base(generation)
    top = (await at.lanes.raw("HGET", f"{base}:tops", str(lane))).decode()
    await at.lanes.raw("HSET", f"{base}:tops", str(lane), f"{top} 99")
    await at.lanes.raw("HSET", f"{base}:passed", str(lane), "0 0 0 99")
    assert (await at.lanes.tops(generation))[lane].entries == 1
    assert (await at.lanes.passed(generation))[lane].entries == 0


async def test_a_held_change_of_a_newer_source_uses_up_no_attempt(at: Bench) -> None:
    await at.load(on)
    await at.put("items", item(1, 1))
    lane = at.lane_of("log", item(1, 1))
    await at.lanes.park(at.writer.generation, {lane: 1})
    drain = at.drain("log")
    await drain.run(lane)
    await at.db.execute("update tailrace.held set source = 'wal of another kind'")
    for _ in range(3):
        waits = await drain.run(lane)
        assert waits.ended is Pass.NEWER
    assert await at.rows("held", "status, attempts, first_failed_at is null") == [("parked", 0, True)]
    await at.db.execute("update tailrace.held set source = 'realtime'")
    await at.settle(drain)
    assert await at.log() == [1]


async def test_lanes_of_a_newer_format_are_read_and_written_by_nobody_older(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    await at.load(on)
    drain, lane = at.drain("log"), at.lane_of("log", item(1, 1))
    await at.put("items", item(1, 1))
    await at.db.execute("update tailrace.source set format = format + 1")
    waits = await drain.run(lane)
    assert (waits.ended, await at.log()) == (Pass.NEWER, [])
    with pytest.raises(LeaseLostError):
        await lease.renew(at.engine, at.token, None)
    await lease.give_up(at.engine, at.token, None)
    with pytest.raises(NewerFormat, match="format 2"):
        await lease.take(at.engine, lease.new_name(), "an older one")
    monkeypatch.setattr(lease, "FORMAT", 2)
    monkeypatch.setattr(lanes, "FORMAT", 2)
    assert await lease.take(at.engine, lease.new_name(), "a newer one")
    await drain.run(lane)
    assert await at.log() == [1]


async def test_an_older_worker_leaves_such_a_lane_to_others_for_a_while(at: Bench) -> None:
    await at.load(on)
    write_as_newer(at)
    await at.put("items", item(1, 1))
    lane = at.lane_of("log", item(1, 1))
    older = at.worker("older")
    async with asyncio.timeout(20):
        await older.drain(lane)
    assert await at.lanes.raw("HGET", at.lanes.claims, str(lane)) is None
    assert "upgrade" in older.newer
    assert older.doing().startswith("waiting: the next entry of")
    older.begin(lane)
    assert older.lanes_now() == {"log": 0}
    assert await at.lanes.sweep(at.writer.generation) == [lane]
