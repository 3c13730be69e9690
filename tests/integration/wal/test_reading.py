"""What both transports hand over: every commit once, in order, with positions that stay."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event

from tests.integration.wal.bench import Kind, Log, database
from tests.stack import Servers
from worker.change import RawChange
from worker.wal import ReadingLostError, SlotBusyError, SlotMissingError, StreamReader, WalError
from worker.wal.windows import WindowReader


def brief(change: RawChange) -> tuple[str, bytes | None]:
    row = change.record or change.old_record or {}
    return change.type, row.get("id")


async def test_changes_come_in_commit_order_with_the_positions_of_their_commits(log: Log, kind: Kind) -> None:
    async with log.reading(kind) as reading:
        await log.db.execute("insert into orders values (1, 7, 'a', 1.50)")
        async with log.db.transaction():
            await log.db.execute("update orders set total = 2 where id = 1")
            await log.db.execute("insert into orders values (2, 7, null, null)")
        await log.db.execute("delete from orders where id = 1")
        rows = await reading.count(4)
    assert [brief(row) for row in rows] == [
        ("INSERT", b"1"),
        ("UPDATE", b"1"),
        ("INSERT", b"2"),
        ("DELETE", b"1"),
    ]
    positions = [position for position, _ in reading.changes]
    assert positions == sorted(set(positions))
    assert [position.ordinal for position in positions] == [0, 0, 1, 0]
    assert positions[1].lsn == positions[2].lsn
    assert rows[1].record == {"id": b"1", "customer": b"7", "note": b"a", "total": b"2.00"}
    assert rows[2].record == {"id": b"2", "customer": b"7", "note": None, "total": None}
    assert rows[3].old_record == {"id": b"1"}
    assert rows[0].commit_timestamp is not None
    assert rows[0].commit_timestamp < (rows[3].commit_timestamp or "")
    assert rows[2].xid == await log.db.fetchval("select xmin::text::bigint from orders where id = 2")


async def test_every_reading_gives_the_same_positions_and_payloads_until_the_slot_moves(log: Log) -> None:
    await log.db.execute("insert into orders select g, g, 'x', g from generate_series(1, 20) g")
    await log.db.execute("update orders set note = 'y' where id <= 5")
    seen = []
    for kind in ("stream", "windows", "stream"):
        async with log.reading(kind) as reading:  # type: ignore[arg-type] # literals
            await reading.count(25)
        seen.append([(position, row.payload) for position, row in reading.changes])
    assert seen[0] == seen[1] == seen[2]
    for position, payload in seen[0]:
        assert RawChange.decode("wal", payload).position == position


async def test_the_slot_moves_only_when_told_and_never_beyond_what_was_handed_over(
    log: Log, kind: Kind
) -> None:
    start = (await log.state()).confirmed
    async with log.reading(kind) as reading:
        await log.db.execute("insert into orders values (1)")
        await log.db.execute("insert into orders values (2)")
        await reading.count(2)
        assert (await log.state()).confirmed == start
        far = reading.read_to
        assert await reading.reader.advance(far + 2**30) == far
        await log.until_confirmed(far)
        # Backwards is no error, and moves nothing.
        await reading.reader.advance(reading.changes[0][0].lsn + 1)
        await log.db.execute("insert into orders values (3)")
        await reading.count(3)
    async with log.reading(kind) as again:
        assert [brief(row) for row in await again.count(1)] == [("INSERT", b"3")]
    assert (await log.state()).confirmed == far


async def test_the_server_does_not_move_the_slot_on_its_own(log: Log) -> None:
    # Keepalives tell how far the log has come; psycopg2 would report that as flushed.
    await log.db.execute("create table elsewhere (id int)")
    start = (await log.state()).confirmed
    async with log.reading("stream") as reading:
        await log.db.execute("insert into elsewhere values (1)")
        await reading.to(await log.now())
        await log.db.execute("insert into orders values (1)")
        await reading.count(1)
        await log.db.execute("insert into elsewhere values (2)")
        await reading.to(await log.now())
        # The answer to a feedback comes after the server has acted on it.
        read_to = reading.read_to
        await log.db.execute("insert into elsewhere values (3)")
        await reading.until(lambda one: one.read_to > read_to)
    assert (await log.state()).confirmed == start


async def test_a_transaction_half_handed_over_holds_the_slot_back(log: Log, kind: Kind) -> None:
    async with log.reading(kind) as reading:
        await log.db.execute("insert into orders values (-1)")
        await reading.count(1)
        await log.db.execute("insert into orders select g from generate_series(1, 5000) g")
        await reading.until(lambda one: len(one.changes) > 1000)
        assert reading.batches[-1].open
        assert len(reading.changes) < 5001
        commit = reading.changes[-1][0].lsn
        assert await reading.reader.advance(await log.now()) <= commit
    assert (await log.state()).confirmed <= commit
    async with log.reading(kind) as again:
        # The slot may stand before the first commit still, which then comes again.
        await again.until(lambda one: len(one.changes) >= 5000 and not one.batches[-1].open)
        assert len([row for row in again.rows if brief(row)[1] != b"-1"]) == 5000


async def test_large_transactions_come_in_bounded_portions(log: Log, kind: Kind) -> None:
    await log.db.execute("insert into orders select g, 1, 'small' from generate_series(1, 20000) g")
    await log.db.execute(
        "insert into orders select g, 1, repeat(md5(g::text), 20000) from generate_series(20001, 20020) g"
    )
    async with log.reading(kind) as reading:
        await reading.count(20020)
    assert max(len(batch.changes) for batch in reading.batches) <= 1000
    sizes = [sum(len(row.payload) for _, row in batch.changes) for batch in reading.batches]
    assert max(sizes) < 6 << 20
    assert sum(batch.open for batch in reading.batches) >= 19


async def test_rolled_back_work_is_neither_seen_nor_counted(log: Log, kind: Kind) -> None:
    async with log.reading(kind) as reading:
        async with log.db.transaction():
            await log.db.execute("insert into orders values (1)")
            savepoint = log.db.transaction()
            await savepoint.start()
            await log.db.execute("insert into orders values (2)")
            await savepoint.rollback()
            await log.db.execute("insert into orders values (3)")
        rolled_back = log.db.transaction()
        await rolled_back.start()
        await log.db.execute("insert into orders values (4)")
        await rolled_back.rollback()
        await log.db.execute("insert into orders values (5)")
        rows = await reading.count(3)
    assert [brief(row)[1] for row in rows] == [b"1", b"3", b"5"]
    assert [position.ordinal for position, _ in reading.changes] == [0, 1, 0]


async def test_interleaved_transactions_come_one_after_the_other_as_they_committed(
    log: Log, kind: Kind
) -> None:
    other = await asyncpg.connect(log.url)
    try:
        async with log.reading(kind) as reading:
            long = log.db.transaction()
            await long.start()
            await log.db.execute("insert into orders values (1)")
            await other.execute("insert into orders values (2)")
            await reading.count(1)
            await reading.reader.advance(reading.read_to)
            await log.db.execute("insert into orders values (3)")
            await other.execute("insert into orders values (4)")
            await long.commit()
            rows = await reading.count(4)
    finally:
        await other.close()
    assert [brief(row)[1] for row in rows] == [b"2", b"4", b"1", b"3"]
    positions = [position for position, _ in reading.changes]
    assert positions == sorted(positions)


async def test_subtransactions_are_one_transaction_in_order(log: Log, kind: Kind) -> None:
    # More than the 64 that a session keeps in memory; every third is rolled back.
    async with log.reading(kind) as reading:
        await log.db.execute(
            "do $$ begin for n in 1..150 loop begin"
            "  insert into orders values (n);"
            "  begin update orders set note = 'inner' where id = n; exception when others then null; end;"
            "  if n % 3 = 0 then raise exception 'back'; end if;"
            "  exception when others then null; end; end loop; end $$"
        )
        rows = await reading.count(200)
    kept = [str(n).encode() for n in range(1, 151) if n % 3]
    assert [brief(row) for row in rows] == [
        one for number in kept for one in (("INSERT", number), ("UPDATE", number))
    ]
    assert [position.ordinal for position, _ in reading.changes] == list(range(200))
    assert len({position.lsn for position, _ in reading.changes}) == 1


async def test_changes_from_another_server_and_messages_in_the_log(log: Log, kind: Kind) -> None:
    origin = f"elsewhere_{log.slot}_{kind}"
    await log.db.execute("select pg_replication_origin_create($1)", origin)
    try:
        async with log.reading(kind) as reading:
            await log.db.execute("select pg_replication_origin_session_setup($1)", origin)
            await log.db.execute("insert into orders values (1)")
            await log.db.execute("select pg_replication_origin_session_reset()")
            async with log.db.transaction():
                await log.db.execute("insert into orders values (2)")
                await log.db.execute("select pg_logical_emit_message(true, 'test', 'with the commit')")
                await log.db.execute("select pg_logical_emit_message(false, 'test', 'at once')")
                await log.db.execute("insert into orders values (3)")
            rows = await reading.count(3)
    finally:
        await log.db.execute("select pg_replication_origin_drop($1)", origin)
    assert [brief(row)[1] for row in rows] == [b"1", b"2", b"3"]
    assert [position.ordinal for position, _ in reading.changes] == [0, 0, 1]


async def test_own_tables_are_left_out_but_counted_and_the_canary_comes(log: Log, kind: Kind) -> None:
    await log.db.execute(
        "create schema tailrace; create table tailrace.lanes (id int primary key);"
        "create table tailrace.canary (id int primary key);"
        "alter publication supabase_realtime add table tailrace.lanes, tailrace.canary"
    )
    async with log.reading(kind) as reading:
        async with log.db.transaction():
            await log.db.execute("insert into tailrace.lanes values (1)")
            await log.db.execute("insert into orders values (1)")
            await log.db.execute("insert into tailrace.canary values (1)")
        await reading.count(2)
        await log.db.execute("insert into tailrace.lanes values (2)")
        await reading.to(await log.now())
    assert [(position.ordinal, row.table) for position, row in reading.changes] == [
        (1, "orders"),
        (2, "canary"),
    ]


async def test_reading_goes_on_where_only_other_tables_change(log: Log, kind: Kind) -> None:
    await log.db.execute("create table elsewhere (id int)")
    async with log.reading(kind) as reading:
        await log.db.execute("insert into elsewhere select generate_series(1, 1000)")
        reached = await log.now()
        await reading.to(reached)
        assert reading.rows == []
        await reading.reader.advance(reached)
        await log.until_confirmed(reached)


async def test_a_truncate_gives_each_table_a_position_of_its_own(log: Log, kind: Kind) -> None:
    await log.db.execute(
        "create table lines (id int primary key); alter publication supabase_realtime add table lines"
    )
    async with log.reading(kind) as reading:
        async with log.db.transaction():
            await log.db.execute("insert into orders values (1)")
            await log.db.execute("truncate orders, lines")
            await log.db.execute("insert into orders values (2)")
        rows = await reading.count(4)
    assert [position.ordinal for position, _ in reading.changes] == [0, 1, 2, 3]
    assert [row.type for row in rows] == ["INSERT", "TRUNCATE", "TRUNCATE", "INSERT"]
    assert {row.table for row in rows[1:3]} == {"orders", "lines"}
    assert all(row.record is None and row.old_record is None for row in rows[1:3])


async def test_each_change_is_read_with_the_schema_it_was_written_under(log: Log, kind: Kind) -> None:
    steps = [
        "insert into orders values (1, 7, 'a', 1)",
        "alter table orders add column extra jsonb default '{}'",
        "insert into orders values (2, 7, 'b', 1, '[1]')",
        "alter table orders rename column note to remark",
        "alter table orders alter column customer type text",
        "insert into orders values (3, 'seven', 'c', 1)",
        "alter table orders drop column total",
        "alter table orders replica identity full",
        "update orders set remark = 'd' where id = 3",
        "create type mood as enum ('sad', 'ok')",
        "alter table orders add column mood mood",
        "update orders set mood = 'ok' where id = 3",
        "alter table orders rename to purchases",
        "insert into purchases (id) values (4)",
        "drop table purchases",
    ]
    for step in steps:
        await log.db.execute(step)
    async with log.reading(kind) as reading:
        rows = await reading.count(6)
    assert rows[0].record == {"id": b"1", "customer": b"7", "note": b"a", "total": b"1.00"}
    assert (rows[1].record or {})["extra"] == b"[1]"
    assert {column.name: column.type for column in rows[2].columns}["customer"] == "text"
    assert rows[2].record == {
        "id": b"3",
        "customer": b"seven",
        "remark": b"c",
        "total": b"1.00",
        "extra": b"{}",
    }
    assert rows[3].old_record == {"id": b"3", "customer": b"seven", "remark": b"c", "extra": b"{}"}
    assert rows[3].record == {"id": b"3", "customer": b"seven", "remark": b"d", "extra": b"{}"}
    assert {column.name: column.type for column in rows[4].columns}["mood"] == "mood"
    assert (rows[4].record or {})["mood"] == b"ok"
    assert rows[5].table == "purchases"


async def test_a_type_that_is_gone_since_keeps_the_name_the_log_gives(log: Log, kind: Kind) -> None:
    await log.db.execute("create type mood as enum ('sad', 'ok'); alter table orders add column mood mood")
    await log.db.execute("insert into orders (id, mood) values (1, 'ok')")
    await log.db.execute("alter table orders drop column mood; drop type mood")
    async with log.reading(kind) as reading:
        (row,) = await reading.count(1)
    assert row.columns[-1].type == "mood"
    assert (row.record or {})["mood"] == b"ok"


@pytest.mark.parametrize("identity", ["default", "full", "using index orders_customer"])
async def test_old_values_are_those_of_the_replica_identity(log: Log, kind: Kind, identity: str) -> None:
    await log.db.execute(
        "alter table orders alter customer set not null, alter note set storage external;"
        "create unique index orders_customer on orders (customer);"
        f"alter table orders replica identity {identity};"
        "insert into orders values (1, 7, repeat('long ', 2000), 1)"
    )
    async with log.reading(kind) as reading:
        await log.db.execute("update orders set total = 2 where id = 1")
        await log.db.execute("update orders set customer = 8 where id = 1")
        await log.db.execute("update orders set id = 2 where id = 1")
        await log.db.execute("delete from orders where id = 2")
        await reading.count(5)
    old: list[Any] = [row.old_record for row in reading.rows[1:]]
    note = b"long " * 2000
    if identity == "default":
        assert old == [{"id": b"1"}, {"id": b"1"}, {"id": b"1"}, {"id": b"2"}]
    elif identity == "full":
        assert old[0] == {"id": b"1", "customer": b"7", "note": note, "total": b"1.00"}
        assert old[3] == {"id": b"2", "customer": b"8", "note": note, "total": b"2.00"}
    else:
        assert old == [{"customer": b"7"}, {"customer": b"7"}, {"customer": b"8"}, {"customer": b"8"}]
    # Unchanged TOAST is not in the log, but a full old row carries it.
    for row in reading.rows[1:4]:
        assert (row.record or {}).get("note") == (note if identity == "full" else None)
        assert ("note" in (row.record or {})) is (identity == "full")


async def test_a_table_without_identity_gives_its_inserts(log: Log, kind: Kind) -> None:
    await log.db.execute("alter table orders replica identity nothing")
    async with log.reading(kind) as reading:
        await log.db.execute("insert into orders values (1)")
        (row,) = await reading.count(1)
    assert brief(row) == ("INSERT", b"1")


async def test_commits_that_were_not_flushed_when_a_window_began_are_not_lost(log: Log, kind: Kind) -> None:
    # The slot moves as far as it may after every batch: what it passes unread is lost for ever.
    await log.db.execute("set synchronous_commit = off")
    numbers: list[int] = []

    async def write() -> None:
        for number in range(400):
            await log.db.execute("insert into orders values ($1)", number)

    async with log.reading(kind) as reading:
        writing = asyncio.create_task(write())
        while len(numbers) < 400:
            batch = await reading.more()
            numbers += [int(row.record["id"]) for _, row in batch.changes if row.record]
            await reading.reader.advance(batch.read_to)
        await writing
    assert numbers == list(range(400))


async def test_two_readings_of_one_slot_exclude_each_other(log: Log, kind: Kind) -> None:
    async with log.reading("stream") as first:
        await log.db.execute("insert into orders values (1)")
        await first.count(1)
        with pytest.raises(SlotBusyError):
            async with log.reading(kind) as second:
                await second.more()


async def test_a_slot_that_is_not_there_is_named(log: Log, kind: Kind) -> None:
    log.slot = "nobody"
    with pytest.raises(SlotMissingError, match="nobody"):
        async with log.reading(kind) as reading:
            await reading.more()


async def test_reading_ends_with_the_session_it_has(log: Log, kind: Kind) -> None:
    async with log.reading(kind) as reading:
        await log.db.execute("insert into orders values (1)")
        await reading.count(1)
        waiting = asyncio.create_task(reading.until(lambda one: len(one.changes) > 1))
        await log.db.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        if kind == "windows":
            # Sessions of the pool end in between; the next look finds another.
            await log.db.execute("insert into orders values (2)")
        with pytest.raises(ReadingLostError):
            await waiting


async def test_a_bell_cuts_the_pause_of_windows_short(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.wal.windows._SHORTEST_PAUSE", 3600.0)
    monkeypatch.setattr("worker.wal.windows._LONGEST_PAUSE", 3600.0)
    async with log.reading("windows") as reading:
        # A window was read to its end; what comes next is a pause of an hour.
        await log.db.execute("insert into orders values (1)")
        await reading.count(1)
        await log.db.execute("insert into orders values (2)")
        reading.reader.wake()
        assert [brief(row)[1] for row in await reading.count(2)] == [b"1", b"2"]


async def test_a_canary_does_not_make_windows_look_more_often(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    several = asyncio.Event()
    pausing = WindowReader._pause

    async def noted(reader: WindowReader, pause: float, cost: float) -> None:
        pauses.append(pause)
        if len(pauses) == 5:
            several.set()
        await pausing(reader, min(pause, 0.01), 0.0)

    monkeypatch.setattr(WindowReader, "_pause", noted)
    await log.db.execute("create schema if not exists tailrace")
    await log.db.execute("create table tailrace.canary (id int primary key)")
    await log.db.execute("alter publication supabase_realtime add table tailrace.canary")
    async with log.reading("windows") as reading:
        waiting = asyncio.create_task(reading.count(1))
        await several.wait()
        await log.db.execute("insert into tailrace.canary values (1)")
        await waiting
        before = len(pauses)
        await log.db.execute("insert into orders values (1)")
        await reading.count(2)
    # The pause after it is not shorter than those before it, as it would be after any other change.
    assert pauses[: before + 1] == sorted(pauses[: before + 1])


@contextmanager
def statements(log: Log) -> Iterator[list[str]]:
    """Note what the engine is asked."""
    said: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        said.append(" ".join(statement.split()))

    event.listen(log.engine.sync_engine, "before_cursor_execute", note)
    try:
        yield said
    finally:
        event.remove(log.engine.sync_engine, "before_cursor_execute", note)


async def test_a_small_window_is_one_statement(log: Log) -> None:
    async with log.reading("windows") as reading:
        with statements(log) as said:
            await log.db.execute("insert into orders values (1, 7, 'a', 1.50)")
            rows = await reading.count(1)
    assert [brief(row) for row in rows] == [("INSERT", b"1")]
    looks = [statement for statement in said if "peek_binary_changes" in statement]
    assert looks
    assert not any(statement.startswith(("declare", "fetch")) for statement in said)


async def test_little_log_that_decodes_to_much_is_read_in_portions(log: Log) -> None:
    async with log.reading("windows") as reading:
        with statements(log) as said:
            # A few kB of log each, for the values are stored compressed.
            await log.db.execute(
                "insert into orders select g, 1, repeat(g::text, 1500000) from generate_series(1, 4) g"
            )
            rows = await reading.count(4)
    assert [(row.record or {})["note"] for row in rows] == [str(g).encode() * 1_500_000 for g in range(1, 5)]
    assert any(statement.startswith("declare") for statement in said)
    assert max(len(batch.changes) for batch in reading.batches) < 4


async def test_a_window_grows_until_a_large_transaction_fits(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.wal.windows._WINDOW_BYTES", 4096)
    await log.db.execute("insert into orders select g, 1, 'some text' from generate_series(1, 3000) g")
    await log.db.execute("insert into orders values (-1)")
    async with log.reading("windows") as reading:
        rows = await reading.count(3001)
    assert [brief(row)[1] for row in rows[:2]] == [b"1", b"2"]
    assert brief(rows[-1]) == ("INSERT", b"-1")


async def test_a_lost_cursor_is_taken_up_where_it_was_in_the_midst_of_a_transaction(log: Log) -> None:
    await log.db.execute("insert into orders select generate_series(1, 10000)")
    async with log.reading("windows") as reading:
        await reading.until(lambda one: len(one.changes) >= 3000)
        assert reading.batches[-1].open
        await log.db.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        with pytest.raises(ReadingLostError):
            await reading.count(10000)
        await log.engine.dispose()
        reading.begin_again()
        rows = await reading.count(10000)
    assert [brief(row)[1] for row in rows] == [str(number).encode() for number in range(1, 10001)]


@pytest.mark.slow
async def test_a_server_is_answered_while_nobody_reads(log: Log) -> None:
    # Longer than wal_sender_timeout, after which the server would cut the connection.
    await log.db.execute(
        "insert into orders select g, 1, repeat(md5(g::text), 100) from generate_series(1, 10000) g"
    )
    async with log.reading("stream") as reading:
        await reading.more()
        await asyncio.sleep(7)
        rows = await reading.count(10000)
    assert brief(rows[-1]) == ("INSERT", b"10000")


async def test_the_stream_lets_the_slot_go_when_it_is_closed(log: Log) -> None:
    for number in range(3):
        async with log.reading("stream") as reading:
            await log.db.execute("insert into orders values ($1)", number)
            await reading.count(number + 1)
        await log.db.execute(
            "select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = $1",
            log.slot,
        )


async def test_a_silent_server_is_given_up(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.wal.stream._SILENCE_SECONDS", -1.0)
    monkeypatch.setattr("worker.wal.stream._FEEDBACK_SECONDS", 0.01)
    async with log.reading("stream") as reading:
        with pytest.raises(WalError, match="nothing was heard"):
            await reading.until(lambda one: bool(one.changes))


def test_the_stream_works_on_uvloop_as_well(shared: Servers) -> None:
    import uvloop  # noqa: PLC0415 - not on every platform

    async def read() -> list[RawChange]:
        from tests.integration.wal.bench import ORDERS  # noqa: PLC0415 - beside its use

        async with database(shared, ORDERS) as log, log.reading("stream") as reading:
            await log.db.execute("insert into orders select generate_series(1, 3000)")
            rows = await reading.count(3000)
            await reading.reader.advance(reading.read_to)
            await log.until_confirmed(reading.read_to)
            assert isinstance(reading.reader, StreamReader)
            return rows

    # The servers are processes of their own: another loop may talk to them.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert len(runner.run(read())) == 3000
