"""Decoders and canonical texts without a database; all types against asyncpg: test_values_postgres.py."""

import datetime as dt
import ipaddress
import json
from decimal import Decimal
from typing import Any

import pytest
from asyncpg import BitString
from hypothesis import given
from hypothesis import strategies as st

from worker.catalogue import ColumnInfo
from worker.values import canonical, decoder, from_canonical, is_cut, needs_repair
from worker.values.arrays import format_array, parse_array

UTC = dt.UTC


def decode(type_name: str, wire: str) -> Any:
    function = decoder(type_name, "json")
    assert function is not None
    return function(wire.encode())


@pytest.mark.parametrize(
    ("type_name", "wire", "value"),
    [
        ("int8", "9223372036854775807", 2**63 - 1),
        ("int4", "null", None),
        ("oid", '"4294967295"', 2**32 - 1),
        (
            "numeric",
            "1234567890123456789012345678.0123456789",
            Decimal("1234567890123456789012345678.0123456789"),
        ),
        ("numeric", "12345678901234567890123", Decimal(12345678901234567890123)),
        ("numeric", '"NaN"', Decimal("NaN")),
        ("float8", "1" + "0" * 308, 1e308),
        ("float8", '"-Infinity"', float("-inf")),
        ("float4", "3.1415927", 3.1415927410125732),
        ("float4", "0." + "0" * 44 + "1", 1.401298464324817e-45),
        ("bytea", '"deadbeef00"', b"\xde\xad\xbe\xef\x00"),
        ("bytea", '"\\\\xdead"', b"\xde\xad"),
        ("bytea", '""', b""),
        ("timestamptz", '"2024-01-02T01:04:05.5-04:00"', dt.datetime(2024, 1, 2, 5, 4, 5, 500000, UTC)),
        # Before standard time offsets have seconds; a database may set such a zone for Realtime.
        ("timestamptz", '"1880-01-02T01:04:05-00:16:08"', dt.datetime(1880, 1, 2, 1, 20, 13, 0, UTC)),
        ("timestamptz", '"10000-01-01T00:00:00+00:00"', "10000-01-01 00:00:00+00"),
        ("timestamptz", '"0044-03-15T12:00:00+00:00 BC"', "0044-03-15 12:00:00+00 BC"),
        ("timestamptz", '"9999-12-31T23:59:59-04:00"', "9999-12-31 23:59:59-04"),
        ("timestamptz", '"infinity"', dt.datetime.max),  # noqa: DTZ901 - as asyncpg has it
        ("timestamp", '"-infinity"', dt.datetime.min),  # noqa: DTZ901 - as asyncpg has it
        ("date", '"0044-03-15 BC"', "0044-03-15 BC"),
        ("time", '"24:00:00"', "24:00:00"),
        (
            "interval",
            '"-1 years -2 mons +3 days -04:05:06.789"',
            dt.timedelta(-365 - 60 + 3, -14706, -789000),
        ),
        ("inet", '"192.168.1.5/24"', ipaddress.ip_interface("192.168.1.5/24")),
        ("varbit", '"101"', BitString("101")),
        ("_int4", "[[1, null], [3, 4]]", [[1, None], [3, 4]]),
        ("_timestamptz", '["infinity", null]', [dt.datetime.max, None]),  # noqa: DTZ901 - as asyncpg has it
        ("_text", '["[x", "null", null]', ["[x", "null", None]),
        ("_jsonb", '[[1, {"a": 2.50}], null]', [[1, {"a": 2.5}], None]),
        ("hstore", '{"a": "1", "b": null}', {"a": "1", "b": None}),
        ("jsonb", "null", None),
    ],
)
def test_decodes_the_wire(type_name: str, wire: str, value: object) -> None:
    decoded = decode(type_name, wire)
    assert repr(decoded) == repr(value)


def test_json_integers_of_any_length_are_exact() -> None:
    # int() refuses texts over 4300 digits; jsonb does not.
    assert decode("jsonb", '{"e": 1' + "0" * 5000 + "}") == {"e": 10**5000}


def test_json_too_deep_for_python_comes_as_text() -> None:
    wire = "[" * 100_000 + "]" * 100_000
    assert decode("jsonb", wire) == wire


@pytest.mark.parametrize(
    "type_name", ["int4range", "point", "pair", "_int4range", "tid", "unheard_of", "geometry"]
)
def test_types_that_only_postgres_reads_have_no_decoder(type_name: str) -> None:
    assert decoder(type_name, "json") is None
    assert decoder(type_name, "text") is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = [
    "int4",
    "oid",
    "numeric",
    "float4",
    "float8",
    "text",
    "bool",
    "bytea",
    "uuid",
    "date",
    "time",
    "timetz",
]
NAMES += [
    "timestamp",
    "timestamptz",
    "interval",
    "inet",
    "cidr",
    "bit",
    "json",
    "_int4",
    "_text",
    "_timestamptz",
]
NAMES += ["hstore", "_uuid", "macaddr", "_jsonb", "_numeric"]


@pytest.mark.parametrize("type_name", NAMES)
@given(value=json_values)
def test_a_value_of_another_type_never_raises(type_name: str, value: object) -> None:
    # A column may have changed its type between the change and its reading.
    wire = json.dumps(value)
    decoded = decode(type_name, wire)
    text = canonical(wire.encode(), type_name)
    if value is None:
        assert (decoded, text) == (None, None)
    else:
        assert text is not None
        from_canonical(text, type_name)


@given(
    st.recursive(st.none() | st.text(), lambda inner: st.lists(inner, min_size=1, max_size=4), max_leaves=8)
)
def test_array_literals_read_back(value: object) -> None:
    values = value if isinstance(value, list) else [value]
    assert parse_array(format_array(values), str) == values


@pytest.mark.parametrize("bad", ["", "1", "{", "}", "{1}}", '{"a', "{1}{2}", "x{1}"])
def test_what_is_no_array_literal_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="array literal"):
        parse_array(bad, str)


def test_lower_bounds_are_dropped() -> None:
    assert parse_array("[0:1]={1,NULL}", int) == [1, None]


@pytest.mark.parametrize(
    ("type_name", "wires", "text"),
    [
        ("int8", ["17"], "17"),
        ("oid", ["17", '"17"'], "17"),
        ("numeric", ["1", "1.0", "1.00"], "1"),
        ("numeric", ["0", "-0", "0.000"], "0"),
        ("numeric", ["100", "100.0"], "100"),
        ("numeric", ["1e2", "100"], "100"),
        ("float8", ["1", "1.0"], "1.0"),
        ("float4", ["0.1", "0.10000000149011612"], "0.10000000149011612"),
        ("uuid", ['"A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"'], "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        (
            "timestamptz",
            ['"2024-01-01T02:00:00+02:00"', '"2024-01-01T00:00:00.0+00:00"'],
            "2024-01-01T00:00:00+00:00",
        ),
        ("timestamptz", ['"infinity"'], "infinity"),
        ("interval", ['"1 day"', '"24:00:00"'], "1 days 0 microseconds"),
        ("interval", ['"1 mon"', '"30 days"'], "30 days 0 microseconds"),
        ("bytea", ['"DEAD"', '"\\\\xdead"'], "\\xdead"),
        ("bool", ["true"], "true"),
        ("bpchar", ['"a"', '"a  "'], "a"),
        ("citext", ['"Foo"', '"FOO"'], "foo"),
        ("jsonb", ['{"b": 1.0, "a": [1e1]}', '{"a": [10], "b": 1}'], '{"a":[10],"b":1}'),
        ("_numeric", ["[1.0, null]", "[1.00, null]"], "{1,NULL}"),
        ("text", ['"null"'], "null"),
        ("text", ['""'], ""),
        ("int4range", ['"[1,5)"'], "[1,5)"),
    ],
)
def test_equal_values_have_one_canonical_text(type_name: str, wires: list[str], text: str) -> None:
    assert {canonical(wire.encode(), type_name) for wire in wires} == {text}


def test_null_has_no_canonical_text() -> None:
    assert {canonical(b"null", name) for name in [*NAMES, "int4range"]} == {None}


def column(type_name: str, typmod: int = -1, value: str = "") -> ColumnInfo:
    return ColumnInfo("c", type_name, type_name, typmod, value=value)


@pytest.mark.parametrize(
    ("info", "cut"),
    [
        (column("bpchar", 9), True),
        (column("bpchar", 5), False),
        (column("bpchar"), True),
        (column("bit", 4), True),
        (column("bit", 1), False),
        (column("_bpchar", 7), True),
        (column("varbit", 4), False),
        (column("varchar", 24), False),
        (column("code", 9, value="bpchar"), False),
    ],
)
def test_char_and_bit_of_more_than_one_are_cut(info: ColumnInfo, cut: bool) -> None:  # noqa: FBT001 - a case
    assert is_cut(info) is cut
    assert needs_repair(info, b'"a"') is cut
    assert needs_repair(info, b"null") is False
    assert needs_repair(info, None) is True


@pytest.mark.parametrize("type_name", ["numeric", "float4", "float8"])
def test_a_null_number_may_be_nan(type_name: str) -> None:
    assert needs_repair(column(type_name), b"null")
    assert needs_repair(column("domain", value=type_name), b"null")
    assert not needs_repair(column(type_name), b"1")
    assert not needs_repair(column("_" + type_name), b"null")
