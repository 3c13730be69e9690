"""Rows that a backfill writes into the log: as live changes would say them, at a true place, once."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.integration.wal.bench import PUBLICATION, Kind, Log, Reading
from tests.stack import Servers, project
from worker.catalogue import read_catalogue
from worker.change import RawChange
from worker.database import make_engine
from worker.paging import CannotPageError, Givers, Page, Pages, Place, Rows, StoppedError, rewind
from worker.wal.slot import create_slot
from worker.wal.type_names import TypeNames

TABLES = """
create type mood as enum ('fine', 'so so');
create domain short as varchar(5);
create table items (
  a int not null, b text not null, version int not null default 0, note text,
  code char(6), yes boolean, net inet, at timestamptz, real8 float8, price numeric, raw bytea, doc jsonb,
  tags text[], mood mood, short short, pair int4range, doubled int generated always as (version * 2) stored,
  primary key (a, b)
);
insert into items (a, b, version, note, code, yes, net, at, real8, price, raw, doc, tags, mood, short, pair)
select n % 3, 'k:' || n, n, nullif('"ü"' || n, '"ü"7'), 'c', n % 2 = 0, '10.0.0.1',
  '2026-01-02 03:04:05.678+02', 'NaN', 'Infinity', '\\x00ff', '{"a": [1, null]}',
  array['x', null, '{,"}'], 'so so', 'abc', '[1,5)'
from generate_series(1, 20) n;
"""


@dataclass
class Paging:
    """A table, its backfill, and the log."""

    log: Log
    rows: Rows
    pages: Pages

    @property
    def db(self) -> asyncpg.Connection:
        return self.log.db

    async def write(self, place: Place, limit: int = 100) -> Page:
        return await self.pages.write(self.rows, place, limit)

    async def cursor(self) -> Place:
        query = "select cursor::text from tailrace.backfills where id = $1"
        return Place.of(json.loads(await self.db.fetchval(query, self.rows.id)), ("a", "b"))

    @asynccontextmanager
    async def other(self) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.log.url)
        try:
            yield connection
        finally:
            await connection.close()


START = Place(("a", "b"))


async def paging_of(
    log: Log, engine: AsyncEngine, condition: str | None = None, table: str = "items"
) -> Paging:
    async with engine.connect() as connection:
        catalogue = await read_catalogue(connection, PUBLICATION, [("public", table)])
    id_ = await log.db.fetchval(
        "insert into tailrace.backfills (handler, schema_name, table_name, state)"
        " values ('copy', 'public', $1, 'running') returning id",
        table,
    )

    async def at_once() -> None:
        """Nothing else is under way."""

    pages = Pages(engine, PUBLICATION, read_to=lambda: 0, wake=lambda: None, until_quiet=at_once)
    return Paging(log, Rows(id_, "copy", catalogue.tables["public", table], condition), pages)


@pytest.fixture
async def at(shared: Servers) -> AsyncIterator[Paging]:
    async with project(shared, TABLES, "tests.e2e.shop") as made:
        engine = make_engine(made.database_url, name="test")
        slot = f"pages_{made.environment['WORKER_QUEUE']}"
        log = Log(made.database_url, made.db, engine, slot, TypeNames(engine))
        await made.db.execute(
            "insert into tailrace.handlers (name, kind, tables) values ('copy', 'change', '{}')"
        )
        async with engine.connect() as connection:
            await create_slot(connection, slot)
        try:
            yield await paging_of(log, engine)
        finally:
            await engine.dispose()
            await made.kill_all(slot)


async def read(reading: Reading, log: Log) -> list[RawChange]:
    """Read all that has committed."""
    await reading.to(await log.now())
    return [row for row in reading.rows if row.schema == "public"]


def names(rows: list[RawChange]) -> list[tuple[bytes, bytes, bytes]]:
    found = [row.record or row.old_record or {} for row in rows]
    return [(row["a"], row["b"], row["version"]) for row in found]


def versions(rows: list[RawChange], key: bytes) -> list[tuple[bool, bytes]]:
    """Give the versions of a row as they came, and whether the backfill gave them."""
    named = zip(rows, names(rows), strict=True)
    return [(row.given is not None, version) for row, (_, b, version) in named if b == key]


async def test_a_row_reads_as_its_insert_would(at: Paging, kind: Kind) -> None:
    page = await at.write(START)
    await at.db.execute(
        "create temp table kept as select * from items; alter table kept drop column doubled;"
        "delete from items;"
        "insert into items select * from kept order by a, b"
    )
    async with at.log.reading(kind) as reading:
        rows = await read(reading, at.log)
    given, live = [row for row in rows if row.given], [row for row in rows if not row.given and row.record]
    assert (page.rows, len(given), len(live)) == (20, 20, 20)
    by_key = dict(zip(names(live), live, strict=True))
    for name, row in zip(names(given), given, strict=True):
        twin = by_key[name]
        assert (row.type, row.record, row.columns) == ("INSERT", twin.record, twin.columns)
        assert (row.schema, row.table, row.table_oid) == (twin.schema, twin.table, twin.table_oid)
        assert row.backfill == at.rows.id
        again = RawChange.decode("wal", row.payload)
        assert (again.record, again.backfill, again.position, again.given) == (
            row.record,
            row.backfill,
            row.position,
            None,
        )


async def test_pages_go_through_the_table_and_their_positions_stay(at: Paging) -> None:
    place, pages = START, []
    while not place.is_last:
        page = await at.write(place, 6)
        place = page.place
        pages.append(page.rows)
        assert await at.cursor() == place
    assert pages == [6, 6, 6, 2]
    seen = []
    for kind in ("stream", "windows"):
        async with at.log.reading(kind) as reading:  # type: ignore[arg-type] # literals
            rows = await read(reading, at.log)
        seen.append([(row.position, row.payload) for row in rows])
        positions = [row.position for row in rows if row.position]
        assert positions == sorted(set(positions))
        assert [row.position.ordinal for row in rows[:6] if row.position] == list(range(6))
        keys = [(int(a), b) for a, b, _ in names(rows)]
        assert keys == sorted(keys)
        assert len(keys) == 20
    assert seen[0] == seen[1]
    assert await at.db.fetchrow("select rows, keys from tailrace.backfills") == (20, 20)


async def test_a_page_stands_between_the_changes_before_and_after_it(at: Paging, kind: Kind) -> None:
    async with at.other() as other:
        # Open since before the page: what it has changed is left, what it changes later stands behind.
        await other.execute("begin; update items set version = 100 where b = 'k:3'")
        await at.db.execute("update items set version = 200 where b = 'k:6'")
        page = await at.write(START)
        assert (page.rows, page.place.left, page.place.end) == (19, (("0", "k:3"),), True)
        await other.execute("update items set version = 300 where b = 'k:6'; commit")
        page = await at.write(page.place)
        assert (page.rows, page.place.is_last) == (1, True)
    async with at.log.reading(kind) as reading:
        rows = await read(reading, at.log)
    six = versions(rows, b"k:6")
    assert six == [(False, b"200"), (True, b"200"), (False, b"300")]
    three = versions(rows, b"k:3")
    assert three == [(False, b"100"), (True, b"100")]


async def test_rows_that_are_gone_or_moved_meanwhile_are_not_waited_for(at: Paging) -> None:
    async with at.other() as other:
        await other.execute(
            "begin; delete from items where b = 'k:3'; update items set a = 7 where b = 'k:6';"
            "select from items where b = 'k:9' for update"
        )
        page = await at.write(START)
        assert sorted(page.place.left) == [("0", "k:3"), ("0", "k:6"), ("0", "k:9")]
        # Still locked: nothing is written, and nothing is different.
        assert (await at.write(page.place)).place == page.place
        await other.execute("commit")
        page = await at.write(page.place)
    assert (page.rows, page.place.is_last) == (1, True)


async def test_nobody_can_change_a_row_between_its_reading_and_the_commit(at: Paging) -> None:
    await at.db.execute(
        "create function wait() returns trigger language plpgsql as"
        " 'begin perform pg_advisory_xact_lock(1); return new; end';"
        "create trigger wait before update on tailrace.backfills for each row execute function wait()"
    )
    async with at.other() as holder, at.other() as other:
        await holder.execute("begin; select pg_advisory_xact_lock(1)")
        writing = asyncio.create_task(at.write(START), name="test: page")
        waits = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
        async with asyncio.timeout(30):
            while not await at.db.fetchval(waits):
                await asyncio.sleep(0.01)
        # Read, written, and not committed.
        await other.execute("set lock_timeout = '100ms'")
        with pytest.raises(asyncpg.LockNotAvailableError):
            await other.execute("update items set version = -1 where b = 'k:3'")
        await holder.execute("commit")
        assert (await writing).rows == 20
        await other.execute("update items set version = -1 where b = 'k:3'")
    async with at.log.reading("stream") as reading:
        rows = await read(reading, at.log)
    assert [version for _, b, version in names(rows) if b == b"k:3"] == [b"3", b"-1"]


async def test_what_nobody_asked_for_moves_nothing(at: Paging) -> None:
    page = await at.write(START, 5)
    # Another listener has written on: what this one knew is not so any more.
    late = await at.write(START, 5)
    assert (late.rows, late.place) == (0, page.place)
    await at.db.execute("update tailrace.backfills set state = 'cancelled'")
    with pytest.raises(StoppedError):
        await at.write(page.place, 5)
    with pytest.raises(StoppedError):
        await at.pages.passed(at.rows.id, page.place)
    assert await at.cursor() == page.place
    async with at.log.reading("stream") as reading:
        assert len(await read(reading, at.log)) == 5


async def test_what_was_lost_with_the_log_is_written_again(at: Paging) -> None:
    first = await at.write(START, 5)
    await at.pages.passed(at.rows.id, first.place)
    second = await at.write(first.place, 5)
    async with at.log.engine.begin() as connection:
        await rewind(connection, "another")
    assert await at.cursor() == second.place
    async with at.log.engine.begin() as connection:
        await rewind(connection)
    assert await at.cursor() == first.place


async def test_conditions_and_what_the_publication_leaves_out(at: Paging) -> None:
    await at.db.execute(
        "alter publication supabase_realtime set table items (a, b, version, code) where (a <> 1),"
        " tailrace.canary"
    )
    some = await paging_of(
        at.log, at.log.engine, "b like 'k:1%' and note <> ':a' and now()::date > '2001-01-01'"
    )
    page = await some.write(START)
    assert page.place.is_last
    async with at.log.reading("stream") as reading:
        rows = await read(reading, at.log)
    assert [[column.name for column in row.columns] for row in rows] == [["a", "b", "version", "code"]] * len(
        rows
    )
    expected = await at.db.fetch("select b from items where b like 'k:1%' and a <> 1 order by a, b")
    assert [b.decode() for _, b, _ in names(rows)] == [row["b"] for row in expected]


async def test_messages_of_somebody_else_are_no_rows(at: Paging, kind: Kind) -> None:
    secret = await at.db.fetchval("select secret from tailrace.backfills")
    column = '["a", 23, true]'
    head = '[%s, "%s", "copy", "public", "items", 1, "d", [%s]]'
    heads = [head % (at.rows.id, "guessed", column), head % (99, secret, column), "{}", "no JSON", '[1, "x"]']
    async with at.db.transaction():
        for one in heads:
            await at.db.execute("select pg_logical_emit_message(true, 'tailrace.page', $1::text)", one)
            for row in ('["1"]', '["1", "2"]', "nothing", "[1]"):
                await at.db.execute("select pg_logical_emit_message(true, 'tailrace.row', $1::text)", row)
        await at.db.execute("select pg_logical_emit_message(false, 'tailrace.row', 'at once')")
        await at.db.execute("insert into items (a, b) values (9, 'live')")
    givers = Givers(at.log.engine)
    async with at.log.reading(kind) as reading:
        rows = await read(reading, at.log)
    assert [row.given is not None for row in rows] == [True, True, False]
    for row in rows[:2]:
        assert row.given is not None
        assert not await givers.have_given(row.given)
    assert rows[2].record is not None
    assert rows[2].record["b"] == b"live"
    await at.write(START)
    async with at.log.reading(kind) as reading:
        last = (await read(reading, at.log))[-1]
    assert last.given is not None
    assert await givers.have_given(last.given)


async def test_a_role_that_may_not_lock_is_told_what_it_needs(at: Paging) -> None:
    await at.db.execute(
        "create role reader_of_pages login password 'x';"
        "grant usage on schema public, tailrace to reader_of_pages;"
        "grant all on all tables in schema tailrace to reader_of_pages;"
        "grant select on items to reader_of_pages"
    )
    engine = make_engine(re.sub("//[^@]*@", "//reader_of_pages:x@", at.log.url), name="test")
    try:
        other = await paging_of(at.log, engine)
        with pytest.raises(CannotPageError, match=r'GRANT SELECT, UPDATE ON "public"\."items"'):
            await other.write(START)
        await at.db.execute(
            "grant update (version) on items to reader_of_pages; alter table items enable row level security"
        )
        with pytest.raises(CannotPageError, match="row-level security"):
            await other.write(START)
        await at.db.execute("alter table items disable row level security")
        assert (await other.write(START)).rows == 20
    finally:
        await engine.dispose()
        await at.db.execute("drop owned by reader_of_pages; drop role reader_of_pages")


async def test_a_cursor_of_another_key_is_refused_in_words() -> None:
    cursor: Any = {"key": ["id"], "after": ["7"]}
    with pytest.raises(CannotPageError, match="another primary key"):
        Place.of(cursor, ("a", "b"))
    with pytest.raises(CannotPageError, match="another primary key"):
        Place.of(["7"], ("a", "b"))
    assert Place.of(cursor, ("id",)) == Place(("id",), ("7",))
