"""The feed over time: transactions, loss of the database, table changes, many rows."""

import asyncio
from typing import Any

import asyncpg
import pytest

from standin.changes import problem_with


@pytest.fixture
async def tx(db: Any) -> None:
    await db.execute(
        "create table tx (id int primary key, v text); create table tx2 (id int primary key, v text)"
    )
    await db.execute("alter publication supabase_realtime add table tx, tx2")


@pytest.mark.usefixtures("tx")
async def test_transactions_come_whole_in_commit_order_with_one_timestamp(
    watch: Any, db: Any, dsn: str
) -> None:
    await watch.subscribe("s", "tx%")
    other = await asyncpg.connect(dsn)
    await db.execute("begin; insert into tx values (1, 'A')")
    await other.execute("begin; insert into tx2 values (2, 'B')")
    await db.execute("savepoint s; insert into tx values (9, 'rolled back'); rollback to s")
    await db.execute("insert into tx2 values (3, 'A')")
    await other.execute("commit")
    await other.close()
    await db.execute("commit")
    await db.execute("truncate tx, tx2")
    frames = await watch.frames("s")
    assert [frame["record"]["id"] for frame in frames] == [2, 1, 3]
    stamps = [frame["commit_timestamp"] for frame in frames]
    assert stamps[1] == stamps[2]
    assert stamps[0] <= stamps[1]
    assert all(len(stamp) == len("2026-11-20T10:13:43.375Z") for stamp in stamps)


@pytest.mark.usefixtures("tx")
async def test_every_change_of_one_row_in_one_transaction_is_told(watch: Any, db: Any) -> None:
    await watch.subscribe("s", "tx")
    await db.execute("begin; insert into tx values (1, 'a'); update tx set v = 'b'; delete from tx; commit")
    assert [b[0] for b in await watch.brief("s")] == ["INSERT", "UPDATE", "DELETE"]


@pytest.mark.usefixtures("tx")
async def test_fifty_thousand_rows_in_one_transaction_pass_in_order(watch: Any, db: Any) -> None:
    await watch.subscribe("s", "tx")
    await db.execute("insert into tx select g, 'row ' || g from generate_series(1, 50000) g")
    frames = await watch.frames("s")
    assert [frame["record"]["id"] for frame in frames] == list(range(1, 50001))
    assert len({frame["commit_timestamp"] for frame in frames}) == 1


@pytest.mark.usefixtures("tx")
async def test_many_small_transactions_pass_in_order(watch: Any, db: Any) -> None:
    await watch.subscribe("s", "tx")
    await db.execute(
        "create procedure many() language plpgsql as $$ begin for i in 1..12000 loop "
        "insert into tx values (i, 'v'); commit; end loop; end $$"
    )
    await db.execute("call many()")
    assert [frame["record"]["id"] for frame in await watch.frames("s")] == list(range(1, 12001))


@pytest.mark.usefixtures("tx")
async def test_lost_slot_is_a_gap_and_the_feed_goes_on(watch: Any, db: Any) -> None:
    await watch.subscribe("s", "tx")
    await db.execute("insert into tx values (1, 'before')")
    await watch.settled()
    assert watch.feed.gaps == 0
    slot = "select slot_name from pg_replication_slots where active and database = current_database()"
    former = await db.fetchval(slot)
    await db.fetchval(
        "select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = $1", former
    )
    async with asyncio.timeout(20):
        # Postgres has no notification for slots.
        while await db.fetchval(slot) in (former, None):
            await asyncio.sleep(0.01)
    await db.execute("insert into tx values (2, 'after')")
    assert [frame["record"]["id"] for frame in await watch.frames("s")] == [1, 2]
    assert watch.feed.gaps == 1


@pytest.mark.usefixtures("tx")
async def test_subscription_waits_for_a_feed_that_is_not_running_yet(db: Any, watching_with: Any) -> None:
    async with watching_with() as watch:
        await watch.subscribe("s", "tx")
        await db.execute("insert into tx values (1, 'a')")
        assert len(await watch.texts("s")) == 1


async def test_altered_and_renamed_tables_are_followed(watch: Any, db: Any) -> None:
    await db.execute(
        "create table c (id int primary key, v text); alter publication supabase_realtime add table c"
    )
    await watch.subscribe("s", "c")
    for statement in (
        "alter table c add column extra int default 7",
        "alter table c rename column v to vv",
        "alter table c drop column extra",
        "alter table c rename to d",
    ):
        await db.execute(statement)
        table = "d" if "rename to" in statement else "c"
        await db.execute(f"insert into {table} (id) select coalesce(max(id), 0) + 1 from {table}")
        await watch.settled()
    frames = await watch.frames("s")
    assert [frame["table"] for frame in frames] == ["c", "c", "c", "d"]
    assert [list(frame["record"]) for frame in frames] == [
        ["v", "id", "extra"],
        ["id", "vv", "extra"],
        ["id", "vv"],
        ["id", "vv"],
    ]


@pytest.mark.usefixtures("tx")
async def test_change_of_a_table_that_is_gone_when_polled_is_lost_alone(watch: Any, db: Any) -> None:
    await db.execute(
        "create table gone (id int primary key); alter publication supabase_realtime add table gone"
    )
    await watch.subscribe("s", "gone")
    await watch.subscribe("other", "tx")
    await db.execute(
        "begin; insert into tx values (1, 'x'); insert into gone values (1); drop table gone; commit"
    )
    assert len(await watch.texts("other")) == 1
    assert await watch.texts("s") == []


async def test_what_waiting_will_not_mend_is_named(dsn: str, db: Any) -> None:
    await db.execute("create role poor login password 'poor'")
    assert await problem_with(dsn, "supabase_realtime") is None
    assert "no publication other" in str(await problem_with(dsn, "other"))
    assert "may not replicate" in str(
        await problem_with(dsn.replace("postgres:postgres@", "poor:poor@"), "x")
    )
    assert "cannot be reached" in str(await problem_with(dsn.replace("postgres:postgres@", "poor:no@"), "x"))
    await db.execute("drop role poor")


@pytest.mark.usefixtures("tx")
async def test_loss_of_other_connections_than_the_slots_is_no_gap(watch: Any, db: Any) -> None:
    await watch.subscribe("s", "tx")
    await db.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'standin' "
        "and datname = current_database() and pid not in (select active_pid from pg_replication_slots)"
    )
    await watch.subscribe("t", "tx")
    await db.execute("insert into tx values (1, 'a')")
    assert len(await watch.texts("t")) == 1
    assert watch.feed.gaps == 0
