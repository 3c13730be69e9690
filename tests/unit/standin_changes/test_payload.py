import json

from hypothesis import given
from hypothesis import strategies as st

from standin.changes.catalog import Column, Table
from standin.changes.payload import TOO_LARGE, UNAUTHORIZED, View
from standin.changes.pgoutput import Relation, RelationColumn
from standin.changes.rendering import NULL


def view_of(
    names: list[str], *, readable: set[str] | None = None, select: tuple[str, ...] | None = None
) -> View:
    columns = tuple(
        Column(
            name,
            25,
            "text",
            "text",
            index == 0,
            frozenset(["r"] if readable is None or name in readable else []),
        )
        for index, name in enumerate(names)
    )
    relation = Relation(
        1, "s", "t", "d", tuple(RelationColumn(name, 25, in_identity=False) for name in names)
    )
    return View.of(Table(1, "s", "t", row_security=False, columns=columns), relation, "r", select)


@given(st.lists(st.text(min_size=1), min_size=1, unique=True))
def test_keys_stand_in_the_order_of_jsonb(names: list[str]) -> None:
    text = view_of(names).data("INSERT", [b"1"] * len(names), None, "now", too_large=False)
    frame = json.loads(text)
    assert list(frame["record"]) == sorted(names, key=lambda name: (len(name.encode()), name.encode()))
    assert [column["name"] for column in frame["columns"]] == names


def test_absent_values_have_no_key_and_null_has_one() -> None:
    view = view_of(["id", "a", "b"])
    frame = json.loads(view.data("UPDATE", [b"1", NULL, None], [b"1", None, None], "now", too_large=False))
    assert frame["record"] == {"id": 1, "a": None}
    assert frame["old_record"] == {"id": 1}


def test_of_a_large_row_stay_values_of_at_most_64_bytes() -> None:
    view = view_of(["id", "a", "b", "c"])
    record = [b"1", b"x" * 65, NULL, b'"' + b"y" * 62 + b'"']
    frame = json.loads(view.data("INSERT", record, None, "now", too_large=True))
    assert frame["record"] == {"id": 1, "c": "y" * 62}
    assert (frame["errors"], frame["commit_timestamp"]) == ([TOO_LARGE], "now")


def test_role_without_the_key_sees_that_something_happened_and_no_more() -> None:
    view = view_of(["id", "a"], readable={"a"})
    frame = json.loads(view.data("INSERT", [b"1", b'"secret"'], None, "now", too_large=False))
    assert frame["errors"] == [UNAUTHORIZED]
    assert (frame["record"], frame["columns"], frame["commit_timestamp"]) == ({}, [], None)
    deleted = json.loads(view.data("DELETE", None, [b"1", None], "now", too_large=False))
    assert deleted["old_record"] == {}


def test_selection_keeps_the_key() -> None:
    frame = json.loads(
        view_of(["id", "a", "b"], select=("b",)).data(
            "INSERT", [b"1", b"2", b"3"], None, "now", too_large=False
        )
    )
    assert frame["record"] == {"id": 1, "b": 3}
