"""What a person types to the commands for operators: refused before anything is opened, or read as meant."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from worker.change import Column, LogChange, RawChange, encode_columns
from worker.cli.operator import Decision, Wanted, decide
from worker.edits import as_text, columns_of, edit
from worker.errors import ConfigurationError, Refused

DISCARD = Decision("discard", everything=False, dry_run=False, by=None)
REDRIVE = DISCARD._replace(action="redrive")
COLUMNS = (Column("id", "int8", key=True), Column("note", "text"), Column("data", "jsonb"))


def test_times_are_read_in_utc_or_as_so_long_ago() -> None:
    which = Wanted(since="2026-01-31T09:00", until="2026-01-31T09:00+02:00").read()
    assert which.since == datetime(2026, 1, 31, 9, tzinfo=UTC)
    assert which.until == datetime(2026, 1, 31, 7, tzinfo=UTC)
    ago = Wanted(since="90m").read().since
    assert ago is not None
    assert timedelta(minutes=89) < datetime.now(UTC) - ago < timedelta(minutes=91)


def test_a_table_without_a_schema_is_of_public() -> None:
    assert Wanted(table="orders").read().table == "public.orders"
    assert Wanted(table="shop.orders").read().table == "shop.orders"


def test_naming_none_means_none() -> None:
    assert Wanted().read().is_all
    assert not Wanted(ids=[1]).read().is_all


@pytest.mark.parametrize(
    ("wanted", "decision", "complaint"),
    [
        (Wanted(), DISCARD, "--all means"),
        (Wanted(), REDRIVE._replace(dry_run=True), "--all means"),
        (Wanted(since="soon"), REDRIVE, "--since soon is no time"),
        (Wanted([1]), REDRIVE._replace(record="[1]"), "must be a JSON object"),
        (Wanted([1]), REDRIVE._replace(record="{}"), "names no column"),
        (Wanted([1, 2]), REDRIVE._replace(record='{"a": 1}'), "for one dead letter"),
        (Wanted([1]), REDRIVE._replace(record="{}", record_file=Path("x")), "exclude each other"),
        (Wanted([1]), REDRIVE._replace(record_file=Path("/nowhere/x")), "cannot be read"),
    ],
)
def test_bad_usage_is_refused(wanted: Wanted, decision: Decision, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        decide(wanted, decision, as_json=False)


def log_change(kind: str = "INSERT") -> bytes:
    row: list[bytes | bool | None] = [b"1", False, None]
    new, old = (None, row) if kind == "DELETE" else (row, None)
    change = LogChange("public", "t", kind, encode_columns(COLUMNS), new, old, 0, 7, 5, 0)  # type: ignore[arg-type] # one of the words
    return msgspec.msgpack.encode(change)


def test_an_edit_of_the_log_changes_nothing_else() -> None:
    edited = edit("wal", log_change(), {"note": "x", "data": {"a": 1}}, {"note": "x", "data": '{"a": 1}'})
    raw = RawChange.decode("wal", edited.payload)
    assert raw.record == {"id": b"1", "note": b"x", "data": b'{"a": 1}'}
    assert (raw.columns, raw.xid, raw.type) == (COLUMNS, 7, "INSERT")
    assert edited.before == {"note": None, "data": None}


def test_an_edit_of_a_payload_of_realtime_keeps_what_is_exact() -> None:
    payload = (
        b'{"schema":"public","table":"t","type":"INSERT","columns":[{"name":"id","type":"int8"},'
        b'{"name":"price","type":"numeric"}],"record":{"id":9007199254740993,"price":1.10},"more":[1]}'
    )
    edited = edit("realtime", payload, {"price": Decimal("2.50")}, {"price": "2.50"})
    assert edited.payload == payload.replace(b"1.10", b"2.50")


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        ("note", None, None),
        ("note", "a", "a"),
        ("note", True, "true"),
        ("note", Decimal("1.50"), "1.50"),
        ("data", {"a": [Decimal("1.50"), None]}, '{"a":[1.50,null]}'),
        ("data", "a", '"a"'),
    ],
)
def test_a_json_value_as_postgres_reads_it(column: str, value: object, text: str | None) -> None:
    (one,) = [each for each in COLUMNS if each.name == column]
    assert as_text(one, value) == text


def test_what_is_not_there_cannot_be_edited() -> None:
    with pytest.raises(Refused, match='no column "x"'):
        columns_of(RawChange.decode("wal", log_change()), ["x"])
    with pytest.raises(Refused, match=r"a DELETE of public\.t has no record"):
        columns_of(RawChange.decode("wal", log_change("DELETE")), ["id"])
