"""The fast renderers give what Postgres gives, for whatever value."""

import datetime as dt
import decimal
from typing import Any

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from standin.changes.rendering import FAST, Values

DATES = st.dates() | st.sampled_from(
    ["infinity", "-infinity", "0044-03-15 BC", "10000-01-01", "294276-12-31"]
)
MOMENTS = st.datetimes(min_value=dt.datetime(1, 1, 2), max_value=dt.datetime(9999, 12, 30))  # noqa: DTZ001 - Postgres's timestamp has no zone
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
FINITE = st.floats(allow_nan=False, allow_infinity=False)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int2": st.integers(-(2**15), 2**15 - 1),
    "int4": st.integers(-(2**31), 2**31 - 1),
    "int8": st.integers(-(2**63), 2**63 - 1),
    "oid": st.integers(0, 2**32 - 1),
    "bool": st.booleans(),
    "float8": FINITE,
    "float4": st.floats(allow_nan=False, allow_infinity=False, width=32),
    "numeric": st.decimals(allow_nan=False, allow_infinity=False).filter(lambda d: abs(d.adjusted()) < 10000)
    | st.decimals(-1000, 1000, places=4),
    "text": TEXT,
    "varchar": TEXT,
    "name": st.text(st.characters(exclude_characters="\0", max_codepoint=127), max_size=60),
    "uuid": st.uuids(),
    "date": DATES,
    "time": st.times() | st.just("24:00:00"),
    "timetz": st.times().map(lambda t: f"{t}+05:30"),
    "timestamp": MOMENTS | DATES,
    "timestamptz": MOMENTS.map(lambda m: f"{m}+03:00") | DATES,
    "interval": st.builds("{} months {} days {} seconds".format, *[st.integers(-9999, 9999)] * 3),
    "jsonb": st.sampled_from(['{"b": 1, "a": [1.50, null]}', '"x\\u0041"', "null", "1e3", "[]"]),
}


@pytest.mark.parametrize("type_name", VALUES)
async def test_fast_rendering_is_postgres_rendering(db: asyncpg.Connection, type_name: str) -> None:
    oid = await db.fetchval(f"select '{type_name}'::regtype::oid::int")
    await db.execute("set timezone = 'UTC'; set extra_float_digits = 1")
    samples: list[str] = []

    @settings(max_examples=150, deadline=None, database=None)
    @given(VALUES[type_name])
    def collect(value: Any) -> None:
        samples.append(f"{value:f}" if isinstance(value, decimal.Decimal) else str(value))

    collect()
    rows = await db.fetch(
        # `format` uses the output function, as the log does; a cast of a boolean to text does not.
        f"select format('%s', v::{type_name}) as shown, to_jsonb(v::{type_name})::text as json "
        "from unnest($1::text[]) u(v)",
        samples,
    )
    rendered = [(row["shown"], FAST[oid](row["shown"].encode()), row["json"].encode()) for row in rows]
    assert any(fast is not None for _, fast, _ in rendered)
    wrong = [(shown, fast, exact) for shown, fast, exact in rendered if fast not in (None, exact)]
    assert not wrong


async def test_value_without_json_form_takes_no_other_with_it(db: asyncpg.Connection) -> None:
    values = Values()
    for text in (b'{"a": 1}', b'"\\u0000"', b"[2]"):
        values.want("json", text)
    await values.render(db)
    assert [values.rendered("json", text) for text in (b'{"a": 1}', b'"\\u0000"', b"[2]")] == [
        b'{"a": 1}',
        None,
        b"[2]",
    ]
