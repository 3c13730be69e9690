"""Values through the log: the same Python values and the same keys as everything else gives."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.test_values_postgres import KINDS, SETUP, Kind, by_kind, few, same
from tests.integration.wal.bench import PUBLICATION, Log, database
from tests.stack import Servers
from worker.catalogue import Table, read_catalogue
from worker.change import RawChange
from worker.values import canonicalizer, decode_by_database, decoder

# Cut by Realtime only: the log has them whole.
WHOLE = [Kind("char(7)", st.text("abc ", max_size=7)), Kind("bit(5)", st.text("01", min_size=5, max_size=5))]
NOT_FINITE = [
    Kind(name, st.sampled_from(["NaN", "Infinity", "-Infinity", "1.5"]))
    for name in ("numeric", "float8", "real")
]
ALL = [*KINDS, *WHOLE, *NOT_FINITE]
OBJECTS_IN_JSON = {"public.pair", "public.pair[]", 'odd."Strange: type"'}


class Columns:
    """One table for each kind, and a reading of all of them."""

    def __init__(self, log: Log, tables: dict[str, Table]) -> None:
        self.log = log
        self.tables = tables


@pytest.fixture(scope="module")
async def columns(shared: Servers) -> AsyncIterator[Columns]:
    names = {kind.sql: f"kind_{place}" for place, kind in enumerate(ALL)}
    tables = "".join(
        f"create table public.{name} (id int primary key, value {sql});" for sql, name in names.items()
    )
    published = f"alter publication {PUBLICATION} add table {', '.join(names.values())};"
    async with database(shared, SETUP + tables + published) as log:
        for name in ("json", "jsonb"):
            await log.db.set_type_codec(name, schema="pg_catalog", encoder=str, decoder=json.loads)
        async with log.engine.connect() as connection:
            catalogue = await read_catalogue(
                connection, PUBLICATION, [("public", name) for name in names.values()]
            )
        yield Columns(log, {sql: catalogue.tables["public", name] for sql, name in names.items()})


async def through_the_log(columns: Columns, kind: Kind, values: list[str | None]) -> list[RawChange]:
    """Write values, and read them from the log."""
    log, table = columns.log, columns.tables[kind.sql].sql_name
    await log.db.execute(f"truncate {table}")
    # Everything before is passed over: each example reads its own rows alone.
    async with log.engine.connect() as connection:
        await connection.exec_driver_sql(
            f"select pg_replication_slot_advance('{log.slot}', pg_current_wal_flush_lsn())"
        )
    await log.db.execute(
        f"insert into {table} select place, text::{kind.sql} "
        "from unnest($1::text[]) with ordinality as v (text, place)",
        values,
    )
    async with log.reading("windows") as reading:
        return await reading.count(len(values))


async def expected(log: Log, table: str, key: int) -> object:
    try:
        return await log.db.fetchval(f"select value from {table} where id = $1", key)
    except (ValueError, OverflowError):
        # What Python cannot hold is Postgres's text.
        return await log.db.fetchval(f"select value::text from {table} where id = $1", key)


async def decoded(log: Log, table: Table, rows: list[RawChange]) -> list[Any]:
    column = table.columns["value"]
    decode = decoder(column.value_type, "text")
    raws = [(row.record or {})["value"] for row in rows]
    if decode is not None:
        return [decode(raw) for raw in raws]
    async with log.engine.begin() as connection:
        read = await decode_by_database(
            connection,
            [{"value": json.dumps(None if raw is None else raw.decode()).encode()} for raw in raws],
            {"value": column.sql_cast},
            "text",
        )
    return [row["value"] for row in read]


@by_kind(ALL)
@few
@given(data=st.data())
async def test_values_of_the_log_are_those_that_asyncpg_reads(
    columns: Columns, kind: Kind, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.none() | kind.texts, min_size=1, max_size=10))
    table = columns.tables[kind.sql]
    rows = await through_the_log(columns, kind, values)
    assert {column.name: column.type for column in rows[0].columns} == {
        name: column.type for name, column in table.columns.items()
    }
    read = await decoded(columns.log, table, rows)
    for place, value in enumerate(read, 1):
        want = await expected(columns.log, table.sql_name, place)
        assert same(value, want), (rows[place - 1].record, value, want)


@by_kind([kind for kind in KINDS if kind.sql not in OBJECTS_IN_JSON])
@few
@given(data=st.data())
async def test_keys_of_the_log_are_those_of_realtime(
    columns: Columns, kind: Kind, data: st.DataObject
) -> None:
    values = data.draw(st.lists(st.none() | kind.texts, min_size=1, max_size=10))
    table = columns.tables[kind.sql]
    rows = await through_the_log(columns, kind, values)
    log = columns.log
    wires = await log.db.fetch(f"select to_jsonb(value)::text as wire from {table.sql_name} order by id")
    name = table.columns["value"].value_type
    for row, (wire,) in zip(rows, wires, strict=True):
        sent = wire or "null"
        if kind.sql == "bytea":
            sent = sent.replace('"\\\\x', '"')
        of_json = canonicalizer(name)(sent.encode())
        of_text = canonicalizer(name, "text")((row.record or {})["value"])
        assert of_text == of_json, (sent, row.record)


async def test_the_session_s_own_settings_change_no_value(columns: Columns, kind: str) -> None:
    """Styles are set by database or user as often as not."""
    log = columns.log
    name = await log.db.fetchval("select current_database()")
    settings = {
        "datestyle": "German, DMY",
        "intervalstyle": "iso_8601",
        "timezone": "Asia/Kathmandu",
        "extra_float_digits": "-3",
        "bytea_output": "escape",
    }
    try:
        for setting, value in settings.items():
            await log.db.execute(f"alter database {name} set {setting} = '{value}'")
        await log.engine.dispose()
        await log.db.execute(
            "create table if not exists styles (at timestamptz, length interval, number float8, data bytea);"
            f"alter publication {PUBLICATION} add table styles"
        )
        async with log.engine.connect() as connection:
            await connection.exec_driver_sql(
                f"select pg_replication_slot_advance('{log.slot}', pg_current_wal_flush_lsn())"
            )
        await log.db.execute(
            r"insert into styles values"
            r" ('2024-01-02 03:04:05.5+00', '1 day 02:00', 0.1::float8 + 0.2, '\xdeadbeef')"
        )
        async with log.reading(kind) as reading:  # type: ignore[arg-type] # one of the two
            (row,) = await reading.count(1)
    finally:
        await log.db.execute("drop table if exists styles")
        for setting in settings:
            await log.db.execute(f"alter database {name} reset {setting}")
        await log.engine.dispose()
    assert row.record == {
        "at": b"2024-01-02 03:04:05.5+00",
        "length": b"1 day 02:00:00",
        "number": b"0.30000000000000004",
        "data": rb"\xdeadbeef",
    }
