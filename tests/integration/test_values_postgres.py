"""Values of every type: written to Postgres, rendered as Realtime does, decoded, compared with asyncpg's."""

import datetime as dt
import json
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from typing import Any, NamedTuple

import asyncpg
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from standin.embedded import EmbeddedPostgres
from worker.catalogue import Table, read_catalogue
from worker.change import Position, RawChange
from worker.rows.repair import build_changes
from worker.values import canonical, decode_by_database, decoder, from_canonical

SETUP = """
create extension vector;
create schema odd;
create type public.mood as enum ('sad', 'ok', 'very happy');
create domain public.posint as int check (value > 0);
create domain public.label as varchar(20);
create domain public.scores as numeric[];
create type public.pair as (a int, b text);
create type odd."Strange: type" as (x int4range, y public.mood);
"""


def quoted(items: list[Any]) -> str:
    """Write an array literal with every element quoted."""
    parts = []
    for item in items:
        if item is None:
            parts.append("NULL")
        elif isinstance(item, list):
            parts.append(quoted(item))
        else:
            escaped = str(item).replace("\\", "\\\\").replace('"', '\\"')
            parts.append(f'"{escaped}"')
    return "{" + ",".join(parts) + "}"


def arrays(element: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    flat = st.lists(st.none() | element, max_size=4)
    deep = st.integers(1, 3).flatmap(
        lambda width: st.lists(st.lists(element, min_size=width, max_size=width), min_size=1, max_size=3)
    )
    return (flat | deep).map(quoted)


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
ints = {bits: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).map(str) for bits in (16, 32, 64)}
digits = st.text("0123456789", min_size=1, max_size=40)
numerics = st.builds(
    lambda sign, whole, part: f"{sign}{whole}{part and '.' + part}",
    st.sampled_from(["", "-"]),
    digits,
    digits,
) | st.sampled_from(["1e60", "1e-20", "0.1000", "-0", "12.50", "1" + "0" * 400])
offsets = st.integers(-14 * 60, 14 * 60).map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))
# Before 1900 offsets have seconds, which is tested by hand; the last year may leave Python's range in UTC.
EARLY, LATE = dt.datetime(1900, 1, 1), dt.datetime(9990, 1, 1)  # noqa: DTZ001 - hypothesis wants naive bounds
moments = st.datetimes(EARLY, LATE)
far = st.sampled_from(["infinity", "-infinity", "0044-03-15 BC", "10000-01-01", "0001-01-01"])
dates = st.dates().map(str) | far
timestamps = st.datetimes().map(str) | far
timestamptzs = st.datetimes(EARLY, LATE, timezones=offsets).map(str) | far
times = st.times().map(str) | st.just("24:00:00")
timetzs = st.builds(lambda time, zone: str(time.replace(tzinfo=zone)), st.times(), offsets)
intervals = st.builds(
    lambda months, days, micros: f"{months} months {days} days {micros} microseconds",
    *(st.integers(-limit, limit) for limit in (5000, 40000, 10**13)),
)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
).map(json.dumps)
bits = st.text("01", max_size=20)
ranges = st.builds(
    lambda low, width, form: form.format(low, low + width),
    *(st.integers(-(10**6), 10**6), st.integers(1, 100)),
    st.sampled_from(["[{},{})", "({},{}]", "[{},)", "(,{1})", "empty", "(,)"]),
)
tstz_ranges = st.builds(
    lambda start, length: f"[{start},{start + length})",
    moments,
    st.timedeltas(dt.timedelta(1), dt.timedelta(9)),
) | st.sampled_from(["empty", "[2024-01-01,infinity]", "[9999-01-01,10001-01-01)"])
addresses = st.ip_addresses().map(str) | st.sampled_from(
    ["192.168.1.5/24", "10.0.0.1/32", "::1/128", "fe80::1/64"]
)
points = st.builds(lambda x, y: f"({x!r},{y!r})", *[st.floats(-1e6, 1e6)] * 2)


class Kind(NamedTuple):
    sql: str
    texts: st.SearchStrategy[str]


KINDS = [
    Kind("smallint", ints[16]),
    Kind("int", ints[32]),
    Kind("bigint", ints[64]),
    Kind("numeric(38,10)", numerics.filter(lambda text: abs(Decimal(text)) < 10**27)),
    Kind("numeric", numerics),
    Kind("real", st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr)),
    Kind("float8", st.floats(allow_nan=False, allow_infinity=False).map(repr)),
    Kind("text", texts),
    Kind("varchar(20)", texts),
    Kind("char(1)", st.sampled_from(["", "a", "é", "漢", '"'])),
    Kind("bool", st.sampled_from(["true", "false"])),
    Kind("date", dates),
    Kind("time", times),
    Kind("timetz", timetzs),
    Kind("timestamp", timestamps),
    Kind("timestamptz", timestamptzs),
    Kind("timestamptz(0)", timestamptzs),
    Kind("interval", intervals),
    Kind("uuid", st.uuids().map(str)),
    Kind("json", documents),
    Kind("jsonb", documents),
    Kind("bytea", st.binary(max_size=20).map(lambda data: "\\x" + data.hex())),
    Kind("public.mood", st.sampled_from(["sad", "ok", "very happy"])),
    Kind("public.posint", st.integers(1, 2**31 - 1).map(str)),
    Kind("public.label", texts),
    Kind("public.scores", arrays(numerics)),
    Kind("public.pair", st.sampled_from(["(1,two)", "(,)", '(7,"a, ""b""")'])),
    Kind('odd."Strange: type"', st.sampled_from(['("[1,5)",sad)', "(empty,)"])),
    Kind("inet", addresses),
    Kind("cidr", st.sampled_from(["10.0.0.0/8", "192.168.1.5/32", "::/0", "fe80::/10"])),
    Kind("macaddr", st.sampled_from(["08:00:2b:01:02:03", "08-00-2b-01-02-03"])),
    Kind("point", points),
    Kind("circle", points.map(lambda point: f"<{point},2.5>")),
    Kind("tsvector", st.just("a:1 fat:2A cat:3")),
    Kind("public.vector(3)", st.just("[1,2.5,3]")),
    Kind("money", st.integers(-(10**9), 10**9).map(lambda cents: str(cents / 100))),
    Kind("bit(1)", st.sampled_from("01")),
    Kind("varbit", bits),
    Kind("int4range", ranges),
    Kind("int4multirange", ranges.filter(lambda text: text != "empty").map(lambda text: "{" + text + "}")),
    Kind("tstzrange", tstz_ranges),
    Kind("oid", st.integers(0, 2**32 - 1).map(str)),
    Kind("name", texts),
    Kind("int[]", arrays(ints[32])),
    Kind("text[]", arrays(texts)),
    Kind("numeric[]", arrays(numerics | st.sampled_from(["NaN", "Infinity"]))),
    Kind("float8[]", arrays(st.floats().map(repr))),
    Kind("timestamptz[]", arrays(timestamptzs.filter(lambda text: "BC" not in text and "10000" not in text))),
    Kind("date[]", arrays(st.dates().map(str))),
    Kind("bytea[]", arrays(st.binary(max_size=5).map(lambda data: "\\x" + data.hex()))),
    Kind("jsonb[]", st.lists(documents, max_size=3).map(quoted)),
    Kind("public.mood[]", arrays(st.sampled_from(["sad", "very happy"]))),
    Kind("public.posint[]", arrays(st.integers(1, 99).map(str))),
    Kind("int4range[]", arrays(ranges)),
    Kind("public.pair[]", arrays(st.sampled_from(["(1,two)", "(,)"]))),
]
ROUTABLE = [
    kind
    for kind in KINDS
    if kind.sql.split("(")[0]
    in {
        *(
            "smallint",
            "int",
            "bigint",
            "numeric",
            "real",
            "float8",
            "text",
            "varchar",
            "bool",
            "date",
            "time",
        ),
        *("timetz", "timestamp", "timestamptz", "interval", "uuid", "jsonb", "bytea", "inet", "oid", "int[]"),
        *("text[]", "numeric[]", "timestamptz[]", "public.mood", "int4range", "varbit"),
    }
]


class Bench:
    def __init__(self, engine: AsyncEngine, connection: asyncpg.Connection, tables: dict[str, Table]) -> None:
        self.engine = engine
        self.connection = connection
        self.tables = tables


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        connection = await asyncpg.connect(postgres.dsn())
        for name in ("json", "jsonb"):
            await connection.set_type_codec(name, schema="pg_catalog", encoder=str, decoder=json.loads)
        await connection.execute(SETUP)
        names = {kind.sql: f"kind_{place}" for place, kind in enumerate(KINDS)}
        for sql, name in names.items():
            await connection.execute(f"create table public.{name} (id int primary key, value {sql})")
        engine = create_async_engine(postgres.dsn().replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.connect() as reading:
            catalogue = await read_catalogue(reading, "none", [("public", name) for name in names.values()])
        yield Bench(
            engine, connection, {sql: catalogue.tables["public", name] for sql, name in names.items()}
        )
        await engine.dispose()
        await connection.close()


class Row(NamedTuple):
    wire: str
    value: object


async def written(bench: Bench, kind: Kind, values: list[str | None]) -> list[Row]:
    """Write values, and give what Realtime would send and what asyncpg reads; nothing stays."""
    table = bench.tables[kind.sql].sql_name
    transaction = bench.connection.transaction()
    await transaction.start()
    try:
        await bench.connection.execute(
            f"insert into {table} select place, text::{kind.sql} "
            "from unnest($1::text[]) with ordinality as v (text, place)",
            values,
        )
        wires = await bench.connection.fetch(f"select to_jsonb(value)::text from {table} order by id")
        rows = []
        for place, (wire,) in enumerate(wires, 1):
            sent = wire or "null"
            if kind.sql == "bytea":
                sent = sent.replace('"\\\\x', '"')
            rows.append(Row(sent, await _read(bench.connection, kind, table, place)))
        return rows
    finally:
        await transaction.rollback()


async def _read(connection: asyncpg.Connection, kind: Kind, table: str, key: int) -> object:
    # Realtime's json is jsonb's: numbers are written out, so that 1e16 becomes an integer.
    column = "value::jsonb" if kind.sql == "json" else "value"
    try:
        return await connection.fetchval(f"select {column} from {table} where id = $1", key)
    except (ValueError, OverflowError):
        # What Python cannot hold is Postgres's text.
        return await connection.fetchval(f"select value::text from {table} where id = $1", key)


def payload(table: Table, wire: str) -> bytes:
    columns = [{"name": column.name, "type": column.type} for column in table.columns.values()]
    head = {"table": table.name, "type": "INSERT", "columns": columns, "errors": None, "schema": table.schema}
    head["commit_timestamp"] = "2024-02-29T13:14:15.123Z"
    return f'{json.dumps(head)[:-1]}, "record": {{"id": 1, "value": {wire}}}}}'.encode()


def uncut(raw: RawChange) -> RawChange:
    """Take away what is Realtime's own in its values: characters cut off, NaN as null."""
    return msgspec.structs.replace(raw, source="redrive")


def same(got: object, want: object) -> bool:
    if isinstance(want, list):
        return (
            isinstance(got, list)
            and len(got) == len(want)
            and all(same(one, other) for one, other in zip(got, want, strict=True))
        )
    if repr(want) in {"nan", "Decimal('NaN')"}:
        return repr(got) == repr(want)
    return got == want and isinstance(want, type(got))


def by_kind(kinds: list[Kind]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("kind", kinds, ids=[kind.sql for kind in kinds])


few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


@by_kind(KINDS)
@few
@given(data=st.data())
async def test_decodes_what_asyncpg_reads(bench: Bench, kind: Kind, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | kind.texts, min_size=1, max_size=10))
    rows = await written(bench, kind, values)
    table = bench.tables[kind.sql]
    entries = [
        (Position(1, place), uncut(RawChange.decode("realtime", payload(table, row.wire))), 1)
        for place, row in enumerate(rows)
    ]
    async with AsyncSession(bench.engine) as session, session.begin():
        changes = await build_changes(session, [table], entries)
    for change, row in zip(changes, rows, strict=True):
        assert change.record is not None
        assert same(change.record["value"], row.value), (row.wire, change.record["value"], row.value)


@by_kind([kind for kind in KINDS if kind.sql not in {"json", "jsonb", "jsonb[]"}])
@few
@given(data=st.data())
async def test_decodes_the_text_form_alike(bench: Bench, kind: Kind, data: st.DataObject) -> None:
    values = data.draw(st.lists(kind.texts, min_size=1, max_size=10))
    table = bench.tables[kind.sql]
    column = table.columns["value"]
    rows = await written(bench, kind, values)  # type: ignore[arg-type]  # a list of str is one of str | None
    texts = [
        await bench.connection.fetchval(f"select format('%s', $1::text::{kind.sql})", value)
        for value in values
    ]
    decode = decoder(column.value_type, "text")
    if decode is None:
        async with bench.engine.begin() as connection:
            read = await decode_by_database(
                connection,
                [{"value": json.dumps(text).encode()} for text in texts],
                {"value": column.sql_cast},
                "text",
            )
        decoded = [row["value"] for row in read]
    else:
        decoded = [decode(text.encode()) for text in texts]
    for value, row in zip(decoded, rows, strict=True):
        assert same(value, row.value), (value, row.value)


@by_kind(ROUTABLE)
@few
@given(data=st.data())
async def test_equal_values_have_one_canonical_text(bench: Bench, kind: Kind, data: st.DataObject) -> None:
    # The wire does not tell the null of jsonb from NULL.
    values = data.draw(st.lists(kind.texts.filter(lambda text: text != "null"), min_size=2, max_size=6))
    rows = await written(bench, kind, values)  # type: ignore[arg-type]  # a list of str is one of str | None
    type_name = bench.tables[kind.sql].columns["value"].value_type
    keys = [canonical(row.wire.encode(), type_name) for row in rows]
    for one, one_text in zip(keys, values, strict=True):
        for other, other_text in zip(keys, values, strict=True):
            equal = await bench.connection.fetchval(
                f"select $1::text::{kind.sql} = $2::text::{kind.sql}", one_text, other_text
            )
            assert (one == other) is equal, (one, other, one_text, other_text)
        readable = await bench.connection.fetchval(
            f"select $1::text::{kind.sql} = $2::text::{kind.sql}", one, one_text
        )
        assert readable, (one, one_text)


@by_kind([kind for kind in ROUTABLE if kind.sql not in {"interval", "int4range"}])
@few
@given(data=st.data())
async def test_canonical_texts_are_read_back(bench: Bench, kind: Kind, data: st.DataObject) -> None:
    rows = await written(bench, kind, data.draw(st.lists(kind.texts, min_size=1, max_size=6)))
    type_name = bench.tables[kind.sql].columns["value"].value_type
    for row in rows:
        text = canonical(row.wire.encode(), type_name)
        if row.wire == "null":  # the json null of jsonb, which the wire does not tell from NULL
            assert text is None
            continue
        assert text is not None
        value = from_canonical(text, type_name)
        assert value == row.value or same(value, row.value), (text, value, row.value)


async def test_a_value_that_no_longer_fits_its_type_comes_as_written(bench: Bench) -> None:
    rows = [{"value": b'"[1,5)"'}, {"value": b'"no range"'}, {"value": b"null"}]
    async with bench.engine.begin() as connection:
        read = await decode_by_database(connection, rows, {"value": "int4range"})
        # The transaction goes on.
        assert (await connection.exec_driver_sql("select 1")).scalar_one() == 1
    assert [row["value"] for row in read] == [asyncpg.Range(1, 5), "no range", None]


async def test_a_type_that_is_gone_leaves_the_value_as_written(bench: Bench) -> None:
    async with bench.engine.begin() as connection:
        read = await decode_by_database(connection, [{"value": b'{"a": 1}'}], {"value": '"gone"'})
    assert read == [{"value": {"a": 1}}]
