"""The slot and the publication: made, found, judged, moved, freed; and who may."""

import asyncio
import shutil
from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.integration.wal.bench import ORDERS, PUBLICATION, Log, database
from tests.integration.wal.pooler import pooled
from tests.stack import Servers, servers
from worker.database import make_engine
from worker.wal import NotPermittedError, SlotLostError, WalError, choose_transport
from worker.wal.publication import Fingerprint, PublishedTable, interrupted, read_fingerprint
from worker.wal.slot import (
    Recorded,
    Server,
    SlotState,
    advance_slot,
    create_slot,
    drop_slot,
    judge,
    read_permission,
    read_server,
    read_slot,
    terminate_holder,
)

FINE = SlotState(
    name="tailrace",
    plugin="pgoutput",
    ours=True,
    temporary=False,
    two_phase=False,
    active_pid=None,
    confirmed=1000,
    restart=900,
    wal_status="reserved",
    invalidation_reason=None,
    retained_bytes=100,
    safe_wal_size=None,
    keep_size="-1",
)
HERE = Server("7", 1, "2026-01-01T00:00:00+00:00", 2000)
RECORDED = Recorded(1000, "7", 1)


@pytest.mark.parametrize(
    ("slot", "server", "recorded", "finding"),
    [
        (FINE, HERE, RECORDED, "fine"),
        (FINE, HERE, None, "fine"),
        # A crash of Postgres takes the confirmed position back: no gap.
        (FINE._replace(confirmed=500), HERE, RECORDED, "fine"),
        (FINE, HERE._replace(started_at="2026-01-02T00:00:00+00:00"), RECORDED, "fine"),
        (None, HERE, RECORDED, "missing"),
        (FINE._replace(wal_status="lost"), HERE, RECORDED, "lost"),
        (FINE._replace(invalidation_reason="idle_timeout"), HERE, None, "lost"),
        (FINE._replace(plugin="wal2json"), HERE, None, "foreign"),
        (FINE._replace(ours=False), HERE, None, "foreign"),
        (FINE._replace(temporary=True), HERE, None, "foreign"),
        (FINE._replace(two_phase=True), HERE, None, "foreign"),
        (FINE._replace(confirmed=1001), HERE, RECORDED, "ahead"),
        (FINE, HERE._replace(timeline=2), RECORDED, "history"),
        (FINE, HERE._replace(system_identifier="8"), RECORDED, "history"),
    ],
)
def test_what_may_be_read_on_and_what_is_a_gap(
    slot: SlotState | None, server: Server, recorded: Recorded | None, finding: str
) -> None:
    judgement = judge(slot, server, recorded)
    assert judgement.finding == finding
    assert bool(judgement.reason) is (finding != "fine")


def test_a_log_that_ends_before_what_was_read_of_it_is_another_history() -> None:
    assert judge(FINE, HERE, RECORDED, reached=HERE.flushed).finding == "fine"
    judgement = judge(FINE, HERE, RECORDED, reached=HERE.flushed + 1)
    assert judgement.finding == "history"
    assert judgement.reason == (
        "the database was restored: its log ends at 0/7D0, and was read up to 0/7D1 before"
    )


async def test_a_slot_is_made_found_and_dropped(log: Log) -> None:
    async with log.engine.connect() as connection:
        assert await read_slot(connection, "wal_other") is None
        lsn = await create_slot(connection, "wal_other")
        state = await read_slot(connection, "wal_other")
        assert state is not None
        assert (state.confirmed, state.plugin, state.ours, state.temporary) == (lsn, "pgoutput", True, False)
        assert state.wal_status == "reserved"
        assert 0 <= state.retained_bytes < 1 << 30
        with pytest.raises(DBAPIError):
            await create_slot(connection, "wal_other")
        await connection.rollback()
        await drop_slot(connection, "wal_other")
        await drop_slot(connection, "wal_other")
        assert await read_slot(connection, "wal_other") is None


async def test_a_slot_moves_forward_is_clamped_and_never_goes_back(log: Log) -> None:
    start = (await log.state()).confirmed
    await log.db.execute("insert into orders values (1)")
    async with log.engine.connect() as connection:
        reached = await advance_slot(connection, log.slot, 2**50)
        assert start < reached <= await log.now()
        assert (await log.state()).confirmed == reached
        assert await advance_slot(connection, log.slot, start) == start
        assert (await log.state()).confirmed == reached


async def test_a_slot_of_another_database_is_not_ours(log: Log, shared: Servers) -> None:
    async with database(shared) as other, other.engine.connect() as connection:
        state = await read_slot(connection, log.slot)
        assert state is not None
        assert judge(state, await read_server(connection), None).finding == "foreign"


async def test_the_holder_of_a_slot_is_ended(log: Log) -> None:
    async with log.reading("stream") as reading:
        await log.db.execute("insert into orders values (1)")
        await reading.count(1)
        assert (await log.state()).active_pid is not None
        async with log.engine.connect() as connection:
            assert await terminate_holder(connection, log.slot)
            assert (await log.state()).active_pid is None
            assert await terminate_holder(connection, log.slot)
        with pytest.raises(WalError):
            await reading.until(lambda one: len(one.changes) > 1)
    async with log.reading("stream") as again:
        await again.count(1)


async def test_who_may_not_replicate_is_told_what_to_run(log: Log) -> None:
    role = f"plain_{log.slot}"
    await log.db.execute(f"create role {role} login password 'secret'")
    url = log.url.replace("postgres:postgres@", f"{role}:secret@")
    engine = make_engine(url, name="test")
    try:
        async with engine.connect() as connection:
            refused = await read_permission(connection, log.slot)
        assert not refused.allowed
        assert f'alter role "{role}" replication' in refused.reason
        transport = await choose_transport(url)
        assert transport.kind == "windows"
        assert "secret" not in transport.reason
        log.engine, owner = engine, log.engine
        try:
            with pytest.raises(NotPermittedError):
                async with log.reading("windows") as reading:
                    await reading.more()
        finally:
            log.engine = owner
        await log.db.execute(f"alter role {role} replication")
        async with engine.connect() as connection:
            assert (await read_permission(connection, log.slot)).allowed
            assert (await read_server(connection)).timeline == 1
        assert (await choose_transport(url)).kind == "stream"
    finally:
        await engine.dispose()
        await log.db.execute(f"drop role {role}")


async def test_a_server_that_cannot_be_reached_decides_nothing() -> None:
    with pytest.raises(WalError, match="cannot be had"):
        await choose_transport("postgresql://postgres:secret@127.0.0.1:1/postgres")


async def fingerprint(log: Log) -> Fingerprint:
    async with log.engine.connect() as connection:
        found = await read_fingerprint(connection, PUBLICATION)
    assert found is not None
    return msgspec.json.decode(msgspec.json.encode(found), type=Fingerprint)


async def test_a_publication_made_anew_interrupts_all_of_its_tables(log: Log) -> None:
    before = await fingerprint(log)
    assert [(table.schema, table.name) for table in before.tables] == [("public", "orders")]
    assert before.complete
    assert before.truncates
    await log.db.execute(f"drop publication {PUBLICATION}; create publication {PUBLICATION} for table orders")
    assert interrupted(before, await fingerprint(log)) == (("public", "orders"),)
    await log.db.execute(f"drop publication {PUBLICATION}")
    async with log.engine.connect() as connection:
        gone = await read_fingerprint(connection, PUBLICATION)
    assert gone is None
    assert interrupted(before, gone) == (("public", "orders"),)
    await log.db.execute(f"create publication {PUBLICATION}")  # what follows drops the slot alone


async def test_a_table_taken_out_and_put_back_is_interrupted_others_are_not(log: Log) -> None:
    await log.db.execute("create table lines (id int); create table more (id int)")
    await log.db.execute(f"alter publication {PUBLICATION} add table lines")
    before = await fingerprint(log)
    assert interrupted(before, before) == ()
    await log.db.execute(f"alter publication {PUBLICATION} drop table orders")
    await log.db.execute(f"alter publication {PUBLICATION} add table orders, more")
    now = await fingerprint(log)
    assert interrupted(before, now) == (("public", "orders"),)
    await log.db.execute("drop table lines; create table lines (id int)")
    await log.db.execute(f"alter publication {PUBLICATION} add table lines")
    assert interrupted(now, await fingerprint(log)) == (("public", "lines"),)


def test_a_publication_that_leaves_out_kinds_of_changes_interrupts_all() -> None:
    whole = Fingerprint(
        oid=1, complete=True, truncates=True, via_root=False, tables=(PublishedTable("s", "t", 2, 3),)
    )
    part = msgspec.structs.replace(whole, complete=False)
    assert interrupted(None, whole) == ()
    assert interrupted(whole, part) == (("s", "t"),)


async def test_a_publication_of_all_tables_has_them_all(log: Log) -> None:
    await log.db.execute(f"drop publication {PUBLICATION}; create publication {PUBLICATION} for all tables")
    found = await fingerprint(log)
    assert [(table.name, table.membership) for table in found.tables] == [("orders", 0)]


# What follows needs a server of its own: it is stopped, killed, or set to what others could not live with.


@pytest.fixture
async def own(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    folder = tmp_path_factory.mktemp("own")
    async with servers(
        folder, max_prepared_transactions=5, min_wal_size="32MB", max_wal_size="64MB"
    ) as running:
        yield running


@pytest.mark.slow
async def test_a_slot_that_lost_its_log_is_told_apart(own: Servers) -> None:
    async with database(own, ORDERS) as log:
        await log.db.execute("alter system set max_slot_wal_keep_size = '1MB'")
        await log.db.execute("select pg_reload_conf()")
        await log.db.execute(
            "insert into orders select g, 1, repeat('x', 500) from generate_series(1, 50000) g"
        )
        for _ in range(5):
            await log.db.execute("select pg_switch_wal()")
            await log.db.execute("insert into orders select max(id) + 1 from orders")
        await log.db.execute("checkpoint")
        async with log.engine.connect() as connection:
            server = await read_server(connection)
            state = await log.state()
            assert state.wal_status == "lost"
            assert judge(state, server, None).finding == "lost"
        for kind in ("stream", "windows"):
            with pytest.raises(SlotLostError):
                async with log.reading(kind) as reading:  # type: ignore[arg-type] # literals
                    await reading.more()


@pytest.mark.slow
async def test_prepared_transactions_come_when_they_are_committed(own: Servers) -> None:
    async with database(own, ORDERS) as log, log.reading("stream") as reading:
        await log.db.execute("begin; insert into orders values (1); prepare transaction 'one'")
        await log.db.execute("insert into orders values (2)")
        await log.db.execute("begin; insert into orders values (3); prepare transaction 'two'")
        await reading.count(1)
        await log.db.execute("rollback prepared 'two'")
        await log.db.execute("commit prepared 'one'")
        rows = await reading.count(2)
        assert [(row.record or {})["id"] for row in rows] == [b"2", b"1"]
        positions = [position for position, _ in reading.changes]
        assert positions == sorted(positions)
        await reading.close()
        async with log.reading("windows") as windows:
            await windows.count(2)
        assert [position for position, _ in windows.changes] == positions


@pytest.mark.slow
async def test_a_killed_server_forgets_positions_but_no_commits(own: Servers) -> None:
    async with database(own, ORDERS) as log:
        async with log.engine.connect() as connection:
            server = await read_server(connection)
        reading = await log.open("stream")
        await log.db.execute("insert into orders values (1)")
        await reading.count(1)
        confirmed = await reading.reader.advance(reading.read_to)
        await log.until_confirmed(confirmed)
        await log.db.execute("insert into orders values (2)")
        await log.engine.dispose()
        await own.postgres.restart(immediate=True)
        with pytest.raises(WalError):
            await reading.until(lambda one: len(one.changes) > 2)
        await reading.close()
        await log.db.close()
        log.db = await asyncpg.connect(log.url)
        async with log.engine.connect() as connection:
            after = await read_server(connection)
            recorded = Recorded(confirmed, server.system_identifier, server.timeline)
            assert judge(await read_slot(connection, log.slot), after, recorded).finding == "fine"
        assert after.started_at != server.started_at
        async with log.reading("stream") as again:
            await again.until(lambda one: any((row.record or {})["id"] == b"2" for row in one.rows))


@pytest.mark.slow
async def test_a_server_that_stops_in_order_is_not_held_up(own: Servers) -> None:
    # A stopping server waits for each walsender until all was confirmed, which nobody can apply any more.
    async with database(own, ORDERS) as log:
        reading = await log.open("stream")
        await log.db.execute("insert into orders values (1)")
        await reading.count(1)
        await reading.reader.advance(reading.read_to)
        await log.db.execute("insert into orders values (2)")
        await reading.count(2)
        following = asyncio.create_task(reading.until(lambda one: len(one.changes) > 2))
        await log.engine.dispose()
        await log.db.close()
        async with asyncio.timeout(20):
            restarting = asyncio.create_task(own.postgres.restart())
            with pytest.raises(WalError):
                await following
            await reading.close()
            await restarting
        log.db = await asyncpg.connect(log.url)


async def test_windows_work_through_a_pooler_in_transaction_mode(log: Log) -> None:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")

    async def write(engine: AsyncEngine, writer: int) -> None:
        # Other sessions at the same time, so that the pooler deals out its connections anew all the time.
        for number in range(100):
            async with engine.begin() as connection:
                await connection.execute(
                    text("insert into orders (id) values (:id)"), {"id": writer * 1000 + number}
                )

    async with pooled(log.url) as url:
        assert (await choose_transport(url)).kind == "windows"
        engine, log.engine = log.engine, make_engine(url, name="test", size=8)
        try:
            async with log.reading("windows") as reading, asyncio.TaskGroup() as group:
                for writer in range(4):
                    group.create_task(write(log.engine, writer))
                while len(reading.changes) < 400:
                    batch = await reading.more()
                    await reading.reader.advance(batch.read_to)
                await log.db.execute("insert into orders select generate_series(10001, 15000)")
                await reading.count(5400)
        finally:
            await log.engine.dispose()
            log.engine = engine
    keys = [(row.record or {})["id"] for row in reading.rows]
    assert len(set(keys)) == 5400
