"""Filters judged here and by Postgres: the same rows match."""

import datetime as dt
import json
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import NamedTuple

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from standin.embedded import EmbeddedPostgres
from worker.catalogue import ColumnInfo, Table
from worker.filters import Filter

OPERATORS = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">="}
PATTERNS = {"like": "like", "ilike": "ilike"}


class Kind(NamedTuple):
    type: str
    sql: str
    values: st.SearchStrategy[object]


letters = st.text("aAbB%_\\.\n é", max_size=5)
KINDS = [
    Kind("int4", "int4", st.integers(-3, 3)),
    Kind(
        "numeric",
        "numeric",
        st.sampled_from(["1", "1.0", "-2.5", "NaN", "Infinity", "-Infinity"]).map(Decimal),
    ),
    Kind("float8", "float8", st.sampled_from([0.0, -0.0, 1.5, float("nan"), float("inf"), float("-inf")])),
    Kind("float4", "float4", st.floats(width=32)),
    Kind("text", 'text collate "C"', letters),
    Kind("bpchar", "char(5)", st.text("ab ", max_size=5)),
    Kind("bool", "bool", st.booleans()),
    Kind("uuid", "uuid", st.uuids()),
    Kind("bytea", "bytea", st.binary(max_size=2)),
    Kind("date", "date", st.dates(dt.date(2023, 12, 30), dt.date(2024, 1, 2)) | st.just(dt.date.max)),
    Kind("timestamptz", "timestamptz", st.datetimes(timezones=st.just(dt.UTC))),
    Kind("time", "time", st.times()),
]


@pytest.fixture(scope="module")
async def connection(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[asyncpg.Connection]:
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        connection = await asyncpg.connect(postgres.dsn())
        await connection.execute("set timezone = 'UTC'")
        yield connection
        await connection.close()


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def bound(kind: Kind, text: str) -> Filter:
    columns = {"v": ColumnInfo("v", kind.type, kind.type)}
    return Filter.parse(text).bind(Table("public", "t", 1, columns, ("v",), "full", frozenset(columns)))


few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("kind", KINDS, ids=[kind.type for kind in KINDS])
@few
@given(data=st.data())
async def test_comparisons_match_the_rows_that_postgres_matches(
    connection: asyncpg.Connection, kind: Kind, data: st.DataObject
) -> None:
    held, operand = data.draw(st.none() | kind.values), data.draw(kind.values)
    negated = data.draw(st.booleans())
    cast = kind.sql.removesuffix(' collate "C"')
    value, text = await connection.fetchrow(f"select $1::{cast}, format('%s', $2::{cast})", held, operand)
    names = [*OPERATORS, "isdistinct", "in", *(PATTERNS if kind.type == "text" else ())]
    name = data.draw(st.sampled_from(names))
    if name in PATTERNS and text.endswith("\\"):
        return
    written = f"({quoted(text)},{quoted(text)})" if name == "in" else quoted(text)
    sql = {
        "isdistinct": f"$1::{kind.sql} is distinct from $2::text::{kind.sql}",
        "in": f"$1::{kind.sql} = any (array[$2::text::{kind.sql}])",
    }.get(name, f"$1::{kind.sql} {(OPERATORS | PATTERNS).get(name)} $2::text::{kind.sql}")
    condition = f"not ({sql})" if negated else sql
    wanted = await connection.fetchval(f"select coalesce({condition}, false)", held, text)
    text_of_filter = f"v={'not.' if negated else ''}{name}.{written}"
    assert bound(kind, text_of_filter).matches({"v": value}) is wanted, (text_of_filter, value)


documents = st.sampled_from(
    ['{"a": 1}', '{"a": 1.0}', "[1, null]", '"x"', "1", "true", "[true]", "[1]", "{}"]
)


@few
@given(held=documents, operand=documents)
async def test_jsonb_is_compared_by_value(connection: asyncpg.Connection, held: str, operand: str) -> None:
    wanted = await connection.fetchval("select $1::text::jsonb = $2::text::jsonb", held, operand)
    kind = Kind("jsonb", "jsonb", st.none())
    assert bound(kind, f"v=eq.{quoted(operand)}").matches({"v": json.loads(held)}) is wanted
