"""Raw and typed changes, without a database."""

import datetime as dt
import enum
import json
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import BigInteger, DateTime, Enum, Numeric, Text, TypeDecorator
from sqlalchemy.dialects.postgresql import ARRAY, INET, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, object_session
from sqlalchemy.orm.exc import DetachedInstanceError

from worker.change import Change, Column, Context, Position, RawChange, Record
from worker.errors import MalformedChange, MissingValueError

DATA: dict[str, Any] = {
    "table": "orders",
    "type": "UPDATE",
    "record": {"id": 1, "note": "x"},
    "columns": [{"name": "id", "type": "int8"}, {"name": "note", "type": "text"}],
    "errors": None,
    "schema": "public",
    "commit_timestamp": "2026-11-20T10:13:43.375Z",
    "old_record": {"id": 1},
}


def text(**more: object) -> bytes:
    return json.dumps(DATA | more).encode()


big = st.integers(0, 2**63)


@given(st.tuples(big, big), st.tuples(big, big))
def test_positions_order_and_read_back(one: tuple[int, int], other: tuple[int, int]) -> None:
    first, second = Position(*one), Position(*other)
    assert (first < second) is (one < other)
    assert Position.parse(str(first)) == first
    assert str(first) == f"{one[0]}-{one[1]}"


def test_zero_is_below_all_positions() -> None:
    assert Position(0, 1) > Position.ZERO


def test_a_boundary_reads_back_too() -> None:
    assert Position.parse(str(Position(7, -1))) == Position(7, -1)


@pytest.mark.parametrize("bad", ["", "1", "1-2-3", "a-b", "1-"])
def test_a_bad_position_is_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Position.parse(bad)


def test_a_raw_change_keeps_values_as_they_came() -> None:
    payload = text().replace(b'"x"', b"12345678901234567890.10")
    raw = RawChange.decode("realtime", payload)
    assert (raw.schema, raw.table, raw.type, raw.source) == ("public", "orders", "UPDATE", "realtime")
    assert raw.columns == (Column("id", "int8"), Column("note", "text"))
    assert raw.record is not None
    assert bytes(raw.record["note"]) == b"12345678901234567890.10"
    assert raw.errors == ()
    assert RawChange.decode("realtime", raw.payload) == raw


def test_lists_of_columns_are_shared() -> None:
    one, other = (RawChange.decode("realtime", text(table=name)) for name in ("a", "b"))
    assert one.columns is other.columns


def test_many_shapes_of_tables_do_not_confuse_columns() -> None:
    for number in range(3000):
        columns = [{"name": f"c{number}", "type": "int4"}]
        assert RawChange.decode("realtime", text(columns=columns)).columns == (Column(f"c{number}", "int4"),)


def test_refusals_of_realtime_are_changes() -> None:
    errors = ["Error 401: Unauthorized"]
    raw = RawChange.decode("realtime", text(errors=errors, columns=[], record={}, commit_timestamp=None))
    assert (raw.errors, raw.columns, raw.record, raw.commit_timestamp) == (tuple(errors), (), {}, None)


def test_what_is_not_there_is_none() -> None:
    data = {key: value for key, value in DATA.items() if key not in {"record", "old_record"}}
    raw = RawChange.decode("realtime", json.dumps(data | {"type": "TRUNCATE"}).encode())
    assert (raw.record, raw.old_record) == (None, None)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"secret-4711": 1}',
        text(type="secret-4711"),
        text(record=["secret-4711"]),
        text(columns=[{"name": "secret-4711"}]),
        text(table=None),
        text(schema="x")[:-20] + b"secret-4711",
        text(record={"a": 1})[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_change_is_refused_without_its_values(payload: bytes) -> None:
    with pytest.raises(MalformedChange) as caught:
        RawChange.decode("realtime", payload)
    assert "secret-4711" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_record_says_why_a_value_is_missing() -> None:
    record = Record({"id": 1}, {"body": "the row is gone"})
    with pytest.raises(MissingValueError, match="the row is gone"):
        record["body"]
    with pytest.raises(MissingValueError, match="the row is gone"):
        record.get("body", "default")
    with pytest.raises(KeyError) as caught:
        record["other"]
    assert not isinstance(caught.value, MissingValueError)
    assert record.get("other", 5) == 5
    assert record == {"id": 1}
    assert record.missing == {"body": "the row is gone"}


def change(**more: Any) -> Change:
    return Change(position=Position(1, 2), schema="public", table="t", **{"type": "UPDATE", **more})


def test_a_change_is_frozen() -> None:
    with pytest.raises(AttributeError):
        change().type = "DELETE"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("old", "new", "differs"),
    [
        (1, 2, True),
        (1, 1, False),
        (Decimal("1.0"), Decimal("1.00"), False),
        (None, 1, True),
        (None, None, False),
    ],
)
def test_changed_compares_old_and_new(old: object, new: object, differs: bool) -> None:  # noqa: FBT001 - a case
    built = change(record=Record({"v": new}), old_record=Record({"v": old}))
    assert built.changed("v") is differs


def test_nan_does_not_change_into_nan() -> None:
    values = (float("nan"), Decimal("NaN"))
    for one in values:
        built = change(record=Record({"v": type(one)("nan")}), old_record=Record({"v": one}))
        assert built.changed("v") is False


def test_an_unchanged_column_needs_no_old_value() -> None:
    built = change(
        record=Record({"v": "long"}), old_record=Record({}, {"v": "no"}), unchanged=frozenset({"v"})
    )
    assert built.changed("v") is False


def test_changed_does_not_guess() -> None:
    built = change(record=Record({"v": 1}), old_record=Record({}, {"v": "REPLICA IDENTITY FULL helps"}))
    with pytest.raises(MissingValueError, match="REPLICA IDENTITY FULL"):
        built.changed("v")
    with pytest.raises(KeyError):
        built.changed("none")


def test_inserts_and_deletes_change_everything() -> None:
    assert change(type="INSERT", record=Record({"v": 1})).changed("v")
    assert change(type="DELETE", old_record=Record({"v": 1})).changed("v")
    assert change(type="TRUNCATE").changed("v")


class Mood(enum.Enum):
    SAD = "sad"
    OK = "ok"


class Reversed(TypeDecorator[str]):
    impl = JSONB
    cache_ok = True

    def process_result_value(self, value: Any, dialect: object) -> Any:  # noqa: ARG002 - SQLAlchemy's signature
        return None if value is None else value["text"][::-1]


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    amount: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    weight: Mapped[float] = mapped_column("weight_kg", Numeric(asdecimal=False))
    mood: Mapped[Mood] = mapped_column(Enum(Mood, values_callable=lambda kind: [item.value for item in kind]))
    made: Mapped[dt.datetime] = mapped_column(DateTime(timezone=True))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)
    odd: Mapped[str | None] = mapped_column(Reversed)
    tags: Mapped[list[str]] = mapped_column(ARRAY(Text))
    host: Mapped[Any] = mapped_column(INET)
    token: Mapped[UUID]
    late: Mapped[str | None]


ROW = {
    "id": 7,
    "amount": Decimal("12.50"),
    "weight_kg": Decimal("1.5"),
    "mood": "sad",
    "made": dt.datetime(2024, 2, 29, tzinfo=dt.UTC),
    "data": {"a": [1]},
    "odd": {"text": "abc"},
    "tags": ["x"],
    "host": "ignored",
    "token": UUID(int=5),
    "unmapped": 1,
}


def test_as_builds_a_detached_instance_with_the_models_own_types() -> None:
    order = change(type="INSERT", record=Record(ROW, {"late": "gone"})).as_(Order)
    assert (order.id, order.amount, order.mood, order.data) == (7, Decimal("12.50"), Mood.SAD, {"a": [1]})
    assert (order.made, order.tags, order.token) == (ROW["made"], ["x"], UUID(int=5))
    assert isinstance(order.weight, float)
    assert order.odd == "cba"
    assert object_session(order) is None
    with pytest.raises(DetachedInstanceError):
        _ = order.late


def test_as_takes_the_old_row_of_a_delete() -> None:
    assert change(type="DELETE", old_record=Record({"id": 3}, {"amount": "no"})).as_(Order).id == 3


def test_as_needs_a_row_and_its_key() -> None:
    with pytest.raises(ValueError, match="TRUNCATE"):
        change(type="TRUNCATE").as_(Order)
    with pytest.raises(MissingValueError):
        change(type="INSERT", record=Record({}, {"id": "too large"})).as_(Order)


def test_a_context_makes_the_supabase_client_when_first_asked() -> None:
    made: list[object] = []

    def make() -> Any:
        made.append(object())
        return made[-1]

    context = Context(redis=None, log=None, idempotency_key="k", make_supabase=make)  # type: ignore[arg-type]
    assert made == []
    assert context.supabase is context.supabase
    assert len(made) == 1


@pytest.mark.parametrize("position", [Position(7, 0), Position(2**60, 2**41), Position(33178320, -1)])
def test_a_position_is_read_back_from_its_text_floors_too(position: Position) -> None:
    assert Position.parse(str(position)) == position


@pytest.mark.parametrize("text", ["", "7", "7-", "-7", "7-a", "7-0-0"])
def test_what_is_no_position_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Position.parse(text)


def test_rows_of_the_model_that_the_handler_has_annotated() -> None:
    one = change(record=Record(ROW), old_record=Record(ROW | {"id": 4}), model=Order)
    assert isinstance(one.as_(), Order)
    assert one.as_().id == ROW["id"]
    assert one.old_as().id == 4
    assert change(type="INSERT", record=Record(ROW), model=Order).old_as() is None


def test_without_a_model_rows_have_to_be_told_theirs() -> None:
    with pytest.raises(ValueError, match=r"annotate the handler's parameter with it, as in Change\[Order\]"):
        change(record=Record(ROW)).as_()
    with pytest.raises(ValueError, match=r"as in as_\(Order\)"):
        change(record=Record(ROW)).old_as()
