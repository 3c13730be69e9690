"""Whom a handler's error is about, and how many to call at once: guesses, from what can be seen."""

import uuid
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NoReturn

import pytest

from worker.change import Change, Position, Record
from worker.draining.hints import Odds, suspect

CHANGES = [
    Change(position=Position(1, n), schema="public", table="orders", type="INSERT", record=Record({"id": n}))
    for n in range(1, 6)
]


def refuse(row: Any) -> NoReturn:
    raise ValueError("no such thing")


def error_of(handler: Callable[[list[Any]], object], given: list[Any]) -> Exception:
    try:
        handler(given)
    except Exception as error:  # noqa: BLE001 - whatever it raises
        return error
    raise AssertionError("it did not fail")


def goes_through(changes: list[Any]) -> None:
    for change in changes:
        if change.record["id"] == 3:
            raise ValueError("no such thing")


def calls_another(changes: list[Any]) -> list[None]:
    return [refuse(change.record) for change in changes if change.record["id"] == 3]


def has_them_in_tuples(changes: list[Any]) -> None:
    for change, other in [(change, change.record["id"]) for change in changes]:
        if other == 3:
            refuse((change.record, other))


def looks_at_all(changes: list[Any]) -> None:
    if any(change.record["id"] == 3 for change in changes):
        raise ValueError("one of them")


def compares_two(changes: list[Any]) -> None:
    for earlier, later in pairwise(changes):
        if later.record["id"] == 3:
            raise ValueError((earlier, later))


@pytest.mark.parametrize("handler", [goes_through, calls_another, has_them_in_tuples])
def test_an_error_tells_which_change_was_in_hand(handler: Callable[[list[Any]], object]) -> None:
    assert suspect(error_of(handler, CHANGES), CHANGES) == 2


@pytest.mark.parametrize("handler", [looks_at_all, compares_two])
def test_an_error_of_all_or_of_several_tells_of_none(handler: Callable[[list[Any]], object]) -> None:
    assert suspect(error_of(handler, CHANGES), CHANGES) is None


@pytest.mark.parametrize(
    "keys", [[7, 8, 9], [*"abc"], [uuid.UUID(int=n) for n in range(3)], [(1, 2), (3, 4)]]
)
def test_keys_are_known_by_their_values(keys: list[Any]) -> None:
    def handler(given: list[Any]) -> None:
        for key in given:
            if key == keys[1]:
                refuse({"key": key, "total": 1.5})

    assert suspect(error_of(handler, list(keys)), keys) == 1


def test_a_truth_value_is_no_key() -> None:
    def handler(_: list[int]) -> None:
        found = True
        refuse(found)

    assert suspect(error_of(handler, [0, 1]), [0, 1]) is None


def test_what_a_library_has_in_hand_tells_nothing() -> None:
    def handler(given: list[int]) -> None:
        uuid.UUID(int=-1)  # which has a local variable of this value

    assert suspect(error_of(handler, [-1, 2]), [-1, 2]) is None


def test_as_many_are_called_at_once_as_fail_about_every_other_time() -> None:
    odds = Odds()
    assert odds.segment(500) == 500
    odds.count(1000, 10)
    assert 50 <= odds.segment(500) <= 100
    odds.count(1000, 200)
    assert 3 <= odds.segment(500) <= 10
    for _ in range(20):
        odds.count(5000, 0)
    assert odds.segment(500) == 500


def test_errors_that_accuse_the_innocent_are_not_asked_for_long() -> None:
    odds = Odds()
    for _ in range(3):
        assert odds.tells
        odds.suspected(rightly=False)
    assert not odds.tells
    odds.suspected(rightly=True)
    assert odds.tells
