"""What the wire leaves out is read again (absent columns, char(n), bit(n), NaN), or else is missing."""

import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import asyncpg
import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from standin.embedded import EmbeddedPostgres
from worker.catalogue import Table, read_catalogue
from worker.change import Change, Position, RawChange
from worker.errors import MissingValueError
from worker.rows.repair import build_changes

ROWS = """
drop table if exists public.goods;
create table public.goods (
    id bigint primary key, body text, code char(5), flags bit(4), price numeric, weight float8 not null,
    tags char(3)[], doc jsonb, docs json[], at time, during int4range
);
"""


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        engine = create_async_engine(postgres.dsn().replace("postgresql:", "postgresql+asyncpg:"))
        yield engine
        await engine.dispose()


async def run(engine: AsyncEngine, *statements: str) -> None:
    async with engine.begin() as connection:
        for statement in statements:
            for part in filter(str.strip, statement.split(";\n")):
                await connection.exec_driver_sql(part)


async def table_of(engine: AsyncEngine, name: str = "goods", schema: str = "public") -> Table:
    async with engine.connect() as connection:
        catalogue = await read_catalogue(connection, "none", [(schema, name)])
    return catalogue.tables[schema, name]


@pytest.fixture
async def goods(engine: AsyncEngine) -> Table:
    await run(
        engine,
        ROWS,
        "insert into goods values (1, 'long body', 'ab', '1010', 'NaN', 'Infinity', '{abc,d}', '{\"a\": 1}',"
        " '{}', '24:00', '[1,5)')",
        "insert into goods values (2, 'two', 'xyz', '0001', 7.50, 2, null, '\"str\"',"
        " '{null,NULL,\"[1]\"}', '12:00', null)",
    )
    return await table_of(engine)


def change(table: Table, type_: str, record: str | None, old: str | None = None, **more: object) -> RawChange:
    columns = [{"name": column.name, "type": column.type} for column in table.columns.values()]
    data: dict[str, Any] = {"table": table.name, "type": type_, "schema": table.schema, "errors": None}
    data |= {"columns": columns, "commit_timestamp": "2024-02-29T13:14:15.123Z", **more}
    rows = [
        f', "{name}": {row}' for name, row in (("record", record), ("old_record", old)) if row is not None
    ]
    return RawChange.decode("realtime", f"{json.dumps(data)[:-1]}{''.join(rows)}}}".encode())


async def build(engine: AsyncEngine, table: Table, *raws: RawChange) -> list[Change]:
    entries = [(Position(1, place), raw, 1) for place, raw in enumerate(raws)]
    async with AsyncSession(engine) as session, session.begin():
        changes = await build_changes(session, [table], entries)
        # Whatever failed inside, the transaction goes on.
        assert (await (await session.connection()).exec_driver_sql("select 1")).scalar_one() == 1
    return changes


WIRE = (
    '{"id": 1, "body": "long body", "code": "a", "flags": "1", "price": null, "weight": null, '
    '"tags": ["a", "d"], "doc": {"a": 1}, "docs": [], "at": "24:00:00", "during": "[1,5)"}'
)


async def test_reads_again_what_realtime_cuts_and_hides(engine: AsyncEngine, goods: Table) -> None:
    (built,) = await build(engine, goods, change(goods, "INSERT", WIRE))
    assert built.record is not None
    assert built.record["code"] == "ab   "
    assert built.record["flags"] == asyncpg.BitString("1010")
    assert str(built.record["price"]) == "NaN"
    assert built.record["weight"] == float("inf")
    assert built.record["tags"] == ["abc", "d  "]
    assert built.record["during"] == asyncpg.Range(1, 5)
    assert built.record["at"] == "24:00:00"
    assert built.repaired == {"code", "flags", "price", "weight", "tags"}
    assert built.missing == frozenset()
    assert built.key == (1,)


async def test_reads_again_absent_columns_whatever_asyncpg_thinks_of_them(
    engine: AsyncEngine, goods: Table
) -> None:
    # The time 24:00 is more than asyncpg can read: the row is then read as text.
    (built,) = await build(engine, goods, change(goods, "UPDATE", '{"id": 1}', '{"id": 1}'))
    assert built.record is not None
    assert built.record["at"] == "24:00:00"
    assert built.record["code"] == "ab   "
    assert built.record["flags"] == asyncpg.BitString("1010")
    assert built.record["weight"] == float("inf")
    assert built.record["doc"] == {"a": 1}
    assert built.record["body"] == "long body"
    (other,) = await build(engine, goods, change(goods, "UPDATE", '{"id": 2}', '{"id": 2}'))
    assert other.record is not None
    assert other.record["doc"] == "str"
    assert other.record["docs"] == [None, None, [1]]
    assert other.record["price"] == Decimal("7.50")
    assert other.record["during"] is None
    assert other.repaired == set(goods.columns) - {"id"}


async def test_unchanged_toast_is_repaired_and_known_to_be_unchanged(
    engine: AsyncEngine, goods: Table
) -> None:
    wire = '{"id": 2, "code": null, "flags": null, "price": 7.5, "weight": 2, "tags": null, "doc": 1, '
    wire += '"docs": null, "at": null}'
    (built,) = await build(engine, goods, change(goods, "UPDATE", wire, '{"id": 2}'))
    assert built.repaired == built.unchanged == {"body", "during"}
    assert built.changed("body") is False
    with pytest.raises(MissingValueError, match="REPLICA IDENTITY FULL"):
        built.changed("price")


async def test_what_a_too_large_row_dropped_is_repaired_but_may_have_changed(
    engine: AsyncEngine, goods: Table
) -> None:
    errors = ["Error 413: Payload Too Large"]
    raw = change(goods, "UPDATE", '{"id": 1, "weight": 3}', '{"id": 1, "weight": 2}', errors=errors)
    (built,) = await build(engine, goods, raw)
    assert built.record is not None
    assert built.record["body"] == "long body"
    assert built.unchanged == frozenset()
    assert built.changed("weight") is True
    with pytest.raises(MissingValueError, match="413"):
        built.changed("body")


async def test_one_statement_reads_a_whole_batch(engine: AsyncEngine, goods: Table) -> None:
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    whole = WIRE.replace('"id": 1', '"id": 2').replace("null", "1")
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        built = await build(engine, goods, *(change(goods, "INSERT", wire) for wire in (WIRE, whole) * 50))
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
    assert [one.record["code"] for one in built if one.record] == ["ab   ", "xyz  "] * 50
    assert sum("goods" in statement for statement in statements) == 1
    assert sum("int4range" in statement for statement in statements) == 1


async def test_a_plain_table_needs_no_statement(engine: AsyncEngine) -> None:
    await run(
        engine,
        "drop table if exists plain",
        "create table plain (id int primary key, at timestamptz, n numeric)",
    )
    table = await table_of(engine, "plain")
    raw = change(table, "INSERT", '{"id": 1, "at": "2024-01-02T01:04:05.5-04:00", "n": 1.50}')
    # A session that is closed to statements: any would raise.
    session = AsyncSession(engine)
    session.sync_session.bind = None
    (built,) = await build_changes(session, [table], [(Position(7, 1), raw, 3)])
    assert built.record is not None
    assert built.record["at"].isoformat() == "2024-01-02T05:04:05.500000+00:00"
    assert (built.position, built.attempt, built.key, built.source) == ((7, 1), 3, (1,), "realtime")


async def test_a_row_that_is_gone_leaves_columns_missing(engine: AsyncEngine, goods: Table) -> None:
    wire = WIRE.replace('"id": 1', '"id": 99').replace('"body": "long body", ', "")
    (built,) = await build(engine, goods, change(goods, "INSERT", wire))
    assert built.record is not None
    # A null in a column that cannot be null was NaN or an infinity; nobody knows which.
    assert built.missing == {"body", "code", "flags", "tags", "weight"}
    assert built.record["price"] is None
    with pytest.raises(MissingValueError, match="the row is gone"):
        built.record["body"]
    with pytest.raises(MissingValueError):
        built.record.get("code")


async def test_a_null_is_believed_when_todays_value_is_a_number(engine: AsyncEngine, goods: Table) -> None:
    wire = WIRE.replace('"id": 1', '"id": 2').replace('"weight": null', '"weight": 2')
    (built,) = await build(engine, goods, change(goods, "INSERT", wire))
    assert built.record is not None
    assert built.record["price"] is None
    assert "price" not in built.repaired


async def test_without_its_key_a_row_is_not_read_again(engine: AsyncEngine, goods: Table) -> None:
    raw = change(goods, "INSERT", '{"weight": 3}', errors=["Error 413: Payload Too Large"])
    (built,) = await build(engine, goods, raw)
    assert built.key == ()
    assert built.record is not None
    with pytest.raises(MissingValueError, match="primary key"):
        built.record["id"]


async def test_old_values_are_never_guessed(engine: AsyncEngine, goods: Table) -> None:
    old = '{"id": 1, "body": "b", "code": "z", "flags": null, "price": null, "weight": null}'
    raw = change(goods, "DELETE", None, old)
    (built,) = await build(engine, goods, raw)
    assert built.record is None
    assert built.old_record is not None
    assert built.key == (1,)
    assert built.old_record["flags"] is None
    assert built.old_record["price"] is None
    assert {"code", "weight", "doc"} <= built.missing
    with pytest.raises(MissingValueError, match="first character"):
        built.old_record["code"]
    with pytest.raises(MissingValueError, match="NaN"):
        built.old_record["weight"]


async def test_a_table_altered_since_the_change_breaks_nothing(engine: AsyncEngine, goods: Table) -> None:
    before = change(goods, "UPDATE", '{"id": 1, "weight": 3}', '{"id": 1}')
    await run(
        engine,
        "alter table goods drop column body",
        "alter table goods rename column code to sign",
        "alter table goods alter column price type text",
        "alter table goods add column more int default 4",
    )
    # With the catalogue of before: nothing can be read by those names.
    (stale,) = await build(engine, goods, before)
    assert stale.record is not None
    assert stale.record["weight"] == 3.0
    with pytest.raises(MissingValueError, match="altered"):
        stale.record["body"]
    # With that of now: what still exists comes.
    (fresh,) = await build(engine, await table_of(engine), before)
    assert fresh.record is not None
    assert fresh.record["flags"] == asyncpg.BitString("1010")
    assert fresh.record["price"] == "NaN"
    assert fresh.missing == {"body", "code"}
    with pytest.raises(MissingValueError, match="no longer exists"):
        fresh.record["body"]
    assert "more" not in fresh.record


async def test_keys_of_any_type_find_their_rows(engine: AsyncEngine) -> None:
    await run(
        engine,
        'drop schema if exists "odd: one" cascade',
        'create schema "odd: one"',
        'create table "odd: one"."T :x" ("a :b" bytea, at timestamptz, n numeric, big text,'
        ' primary key ("a :b", at, n))',
        "insert into \"odd: one\".\"T :x\" values ('\\xdead', '2024-01-01 00:00+00', 1.50, 'found')",
    )
    table = await table_of(engine, "T :x", "odd: one")
    raw = change(table, "UPDATE", '{"a :b": "dead", "at": "2024-01-01T02:00:00+02:00", "n": 1.5}', "{}")
    (built,) = await build(engine, table, raw)
    assert built.record is not None
    assert built.record["big"] == "found"
    assert built.key[0] == b"\xde\xad"


async def test_a_missing_grant_is_an_error_for_the_operator(engine: AsyncEngine, goods: Table) -> None:
    await run(engine, "drop role if exists nobody", "create role nobody")
    async with AsyncSession(engine) as session, session.begin():
        await (await session.connection()).exec_driver_sql("set local role nobody")
        with pytest.raises(DBAPIError, match="permission denied"):
            await build_changes(
                session, [goods], [(Position(1, 1), change(goods, "UPDATE", '{"id": 1}', "{}"), 1)]
            )


async def test_refusals_and_truncates_are_changes_without_values(engine: AsyncEngine, goods: Table) -> None:
    refused = change(
        goods, "INSERT", "{}", columns=[], commit_timestamp=None, errors=["Error 401: Unauthorized"]
    )
    built = await build(engine, goods, refused, change(goods, "TRUNCATE", None))
    assert [(one.record, one.old_record, one.key) for one in built] == [({}, None, ()), (None, None, ())]
    assert built[0].commit_timestamp is None
