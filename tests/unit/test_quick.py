"""What is read in one step is what the step-by-step way gives, or is left to it."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.catalogue import Catalogue, ColumnInfo, Table
from worker.change import Change, Column, LogChange, LogValue, Position, RawChange, encode_columns
from worker.errors import MalformedChange
from worker.raw import RawSource
from worker.rows.quick import Quick
from worker.rows.repair import build_changes

AT = Position(7, 1)
SAMPLES: dict[str, tuple[object, str]] = {
    # As JSON of Realtime, and as Postgres's text.
    "int2": (-7, "-7"),
    "int4": (2**31 - 1, "2147483647"),
    "int8": (2**63 - 1, "9223372036854775807"),
    "oid": ("16999", "16999"),
    "numeric": (12.5, "12.50"),
    "float4": (0.1, "0.1"),
    "float8": (1e300, "1e+300"),
    "text": ('ä"\n', 'ä"\n'),
    "bool": (True, "t"),
    "bytea": ("00ff", "\\x00ff"),
    "uuid": ("7b0e6f4e-7b3c-4b43-9f0e-2d9f4b1c2a11", "7b0e6f4e-7b3c-4b43-9f0e-2d9f4b1c2a11"),
    "date": ("2026-02-28", "2026-02-28"),
    "time": ("12:00:01.5", "12:00:01.5"),
    "timetz": ("12:00:01+02:00", "12:00:01+02"),
    "timestamp": ("2026-02-28T12:00:01.123456", "2026-02-28 12:00:01.123456"),
    "timestamptz": ("2026-02-28T12:00:01.5+02:00", "2026-02-28 12:00:01.5+02"),
    "interval": ("1 day", "1 day"),
    "inet": ("10.0.0.1", "10.0.0.1"),
    "bit": ("1", "1"),
    "json": ({"a": 12345678901234567890}, '{"a": 12345678901234567890}'),
    "jsonb": ([1, None, 2.50], "[1, null, 2.50]"),
    "hstore": ({"a": None}, '"a"=>NULL'),
    "_int4": ([1, None], "{1,NULL}"),
    "_text": (["a", "b,c"], '{a,"b,c"}'),
    "_timestamptz": (["2026-02-28T12:00:01+00:00"], '{"2026-02-28 12:00:01+00"}'),
}
# What these are is asked of Postgres, or only of a table's declaration.
NOT_OF_THE_LOG = {"hstore"}
# bit without a length is bit(1); the others are of no length here.
TYPES = sorted(SAMPLES)

wild = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
texts = st.sampled_from([text for _, text in SAMPLES.values()]) | st.text(
    alphabet=st.characters(codec="utf-8", exclude_characters="\0")
)


class NoSession:
    """Where the database would be asked."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(name)


def table(type_name: str) -> Table:
    typmod = 1 if type_name == "bit" else -1
    columns = {"id": ColumnInfo("id", "int8", "bigint", not_null=True)}
    columns["it's"] = ColumnInfo("it's", type_name, type_name, typmod)
    return Table("public", "things", 1, columns, ("id",), "default", frozenset({"id"}))


def step_by_step(of: Table, source: RawSource, payload: bytes) -> Change | None:
    """Make the change the long way; None where it is malformed, or the database would be needed."""
    making = build_changes(NoSession(), (of,), [(AT, RawChange.decode(source, payload), 1)])  # type: ignore[arg-type]
    try:
        making.send(None)
    except StopIteration as made:
        changes: Sequence[Change] = made.value
        return changes[0]
    except AssertionError:
        return None
    raise AssertionError("it waits")


def in_one_step(type_name: str, source: RawSource, payload: bytes) -> Change | None:
    return known(type_name, source).change(AT, source, payload)


@functools.cache
def known(type_name: str, source: RawSource) -> Quick:
    """Let it judge the list of columns of all payloads here."""
    quick = Quick(Catalogue({("public", "things"): table(type_name)}, publication_exists=True), None)
    first = log_of(type_name, [b"1", None]) if source == "wal" else payload_of(type_name, None)
    assert quick.change(AT, source, first) is None, "a list of columns that nobody has judged"
    quick.learn()
    return quick


def shown(change: Change | None) -> object:
    """Everything of a change, types of values included; NaN is equal to itself."""
    if change is None:
        return None
    missing = [dict(row.missing) for row in (change.record, change.old_record) if row is not None]
    return repr(msgspec.structs.asdict(change)), missing


def payload_of(type_name: str, value: object, kind: str = "INSERT", **more: object) -> bytes:
    columns = [{"name": "id", "type": "int8"}, {"name": "it's", "type": type_name}]
    data: dict[str, Any] = {
        "schema": "public",
        "table": "things",
        "type": kind,
        "columns": columns,
        "commit_timestamp": "2026-11-20T10:13:43.375Z",
        "errors": None,
        "record": {"id": 1, "it's": value},
    }
    return json.dumps(data | more).encode()


def log_of(
    type_name: str, new: list[LogValue] | None, old: list[LogValue] | None = None, kind: Any = "INSERT"
) -> bytes:
    columns = encode_columns([Column("id", "int8", key=True), Column("it's", type_name)])
    log = LogChange("public", "things", kind, columns, new, old, 1_795_285_803_123_456, 7, 9, 1, 16999)
    return RawChange.of_log(log).payload


@pytest.mark.parametrize("type_name", TYPES)
def test_what_a_type_writes_is_read_in_one_step(type_name: str) -> None:
    value, text = SAMPLES[type_name]
    of = table(type_name)
    for payload in (
        payload_of(type_name, value),
        payload_of(type_name, value, "UPDATE", old_record={"id": 1}),
    ):
        made = in_one_step(type_name, "realtime", payload)
        assert made is not None
        assert shown(made) == shown(step_by_step(of, "realtime", payload))
    for payload in (
        log_of(type_name, [b"1", text.encode()]),
        log_of(type_name, [b"1", None], [b"2", text.encode()], "UPDATE"),
        log_of(type_name, None, [b"1", False], "DELETE"),
    ):
        made = in_one_step(type_name, "wal", payload)
        assert (made is None) is (type_name in NOT_OF_THE_LOG)
        assert made is None or shown(made) == shown(step_by_step(of, "wal", payload))


@pytest.mark.parametrize("type_name", TYPES)
@given(value=wild)
def test_of_whatever_json_comes_it_makes_the_same_or_nothing(type_name: str, value: object) -> None:
    of, payload = table(type_name), payload_of(type_name, value)
    made = in_one_step(type_name, "realtime", payload)
    assert made is None or shown(made) == shown(step_by_step(of, "realtime", payload))


@pytest.mark.parametrize("type_name", TYPES)
@given(text=texts)
def test_of_whatever_text_comes_it_makes_the_same_or_nothing(type_name: str, text: str) -> None:
    of, payload = table(type_name), log_of(type_name, [b"1", text.encode()])
    made = in_one_step(type_name, "wal", payload)
    assert made is None or shown(made) == shown(step_by_step(of, "wal", payload))


@pytest.mark.parametrize(
    "more",
    [
        {"record": {"id": 1}},  # an unchanged TOAST value
        {"errors": ["Error 413: Payload Too Large"]},
        {"record": {"id": 1, "it's": None}},  # of a numeric column: NULL, or NaN
        {"columns": []},
        {"record": [1]},
        {"type": "UPSERT"},
        {"record": {"id": 1, "it's": 2, "more": 3}},
    ],
)
def test_what_is_out_of_the_ordinary_is_left_to_the_long_way(more: dict[str, Any]) -> None:
    assert in_one_step("numeric", "realtime", payload_of("numeric", 1)) is not None
    assert in_one_step("numeric", "realtime", payload_of("numeric", 1, **more)) is None


def test_so_is_a_table_with_a_column_that_json_names_in_another_way() -> None:
    columns = {name: ColumnInfo(name, "int8", "bigint") for name in ("id", 'a"b')}
    of = Table("public", "things", 1, columns, ("id",), "default", frozenset({"id"}))
    quick = Quick(Catalogue({("public", "things"): of}, publication_exists=True), None)
    listed = [{"name": name, "type": "int8"} for name in columns]
    payload = payload_of("int8", 1, columns=listed, record={"id": 1, 'a"b': 2})
    for _ in range(2):
        assert quick.change(AT, "realtime", payload) is None
        quick.learn()
    assert step_by_step(of, "realtime", payload) is not None


def test_of_a_deleted_row_it_names_what_is_missing() -> None:
    of = table("text")
    payload = payload_of("text", "x", "DELETE", record=None, old_record={"id": 3})
    made = in_one_step("text", "realtime", payload)
    assert made is not None
    assert (made.key, made.missing) == ((3,), frozenset({"it's"}))
    assert shown(made) == shown(step_by_step(of, "realtime", payload))


def test_a_list_of_columns_is_judged_again_when_the_catalogue_has_changed() -> None:
    catalogue = Catalogue({("public", "things"): table("text")}, publication_exists=True)
    quick = Quick(catalogue, None)
    payload = payload_of("text", "x")
    quick.change(AT, "realtime", payload)
    quick.learn()
    assert quick.change(AT, "realtime", payload) is not None
    catalogue.renew(Catalogue({("public", "things"): table("int4")}, publication_exists=True))
    assert quick.change(AT, "realtime", payload) is None
    quick.forget()  # it could not be judged
    quick.learn()
    assert quick.change(AT, "realtime", payload) is None


@pytest.mark.parametrize("source", ["wal", "realtime", "unheard of"])
def test_it_complains_of_nothing(source: Any) -> None:
    quick = Quick(Catalogue({}, publication_exists=True), None)
    assert quick.change(AT, source, b"{") is None
    if source != "unheard of":
        with pytest.raises(MalformedChange):
            RawChange.decode(source, b"{")
