"""What is parked: which rows are applied, which stay, and which wait behind others."""

import random
from collections.abc import Iterable, Mapping

import pytest

from worker.change import Position
from worker.draining.unparking import Choice, choose
from worker.held import HeldRow, Kept
from worker.parked import Before, Wall

NOTHING = Before({}, {})


def row(id_: int, keys: str, lanes: Iterable[int] = (0,)) -> HeldRow:
    kept = Kept(tuple(lanes), tuple(key.encode() for key in keys), Position(id_, 0), "wal", b"")
    return HeldRow(id_, kept, 0)


def ids(choice: Choice) -> Mapping[str, list[int]]:
    found = {name: [one.id for one in getattr(choice, name)] for name in ("free", "later", "behind", "alone")}
    return {name: rows for name, rows in found.items() if rows}


def test_what_follows_one_that_is_held_is_held_behind_it_and_nothing_else() -> None:
    rows = [row(5, "a"), row(6, "ab"), row(7, "b"), row(8, "c")]
    assert ids(choose(rows, {0}, Before({b"a": 2}, {}))) == {"free": [8], "behind": [5, 6, 7]}


def test_what_was_parked_before_the_held_one_is_free() -> None:
    assert ids(choose([row(5, "a"), row(9, "a")], {0}, Before({b"a": 7}, {}))) == {"free": [5], "behind": [9]}


def test_without_all_its_lanes_a_row_stays_and_so_does_what_follows_it() -> None:
    rows = [row(1, "a"), row(2, "ab", (0, 1)), row(3, "a"), row(4, "c")]
    assert ids(choose(rows, {0}, NOTHING)) == {"free": [1, 4], "later": [2, 3]}
    assert ids(choose(rows, {0, 1}, NOTHING)) == {"free": [1, 2, 3, 4]}


def test_without_all_its_lanes_a_row_does_not_even_go_to_wait() -> None:
    rows = [row(5, "ab", (0, 1)), row(6, "a")]
    assert ids(choose(rows, {0}, Before({b"b": 2}, {}))) == {"later": [5, 6]}
    assert ids(choose(rows, {0, 1}, Before({b"b": 2}, {}))) == {"behind": [5, 6]}


def test_behind_a_parked_row_of_a_lane_that_is_not_here_a_row_stays() -> None:
    assert ids(choose([row(5, "a"), row(6, "b")], {0}, Before({}, {b"a": 3}))) == {"free": [6], "later": [5]}


def test_a_change_of_all_keys_goes_alone_and_stops_all_after_it() -> None:
    rows = [row(1, "a"), row(2, ""), row(3, "b")]
    assert ids(choose(rows, {0}, NOTHING)) == {"free": [1], "alone": [2], "later": [3]}


@pytest.mark.parametrize(("waits_long", "fate"), [(True, "behind"), (False, "later")])
def test_behind_a_change_of_all_keys_that_waits_already(*, waits_long: bool, fate: str) -> None:
    rows = [row(1, "a"), row(3, "b")]
    assert ids(choose(rows, {0}, NOTHING, Wall(2, waits_long))) == {"free": [1], fate: [3]}


@pytest.mark.parametrize("seed", range(50))
def test_no_row_is_applied_before_an_earlier_one_of_its_key(seed: int) -> None:
    chance = random.Random(seed)
    lanes = {key: chance.randrange(3) for key in "abcdef"}
    every = []
    for id_ in range(30):
        keys = "".join(chance.sample("abcdef", chance.choice([1, 1, 1, 2])))
        every.append(row(id_, keys, sorted({lanes[key] for key in keys})))
    locked = set(chance.sample(range(3), chance.choice([1, 2, 3])))
    long = {one.id for one in every if chance.random() < 0.1}
    rows = [one for one in every if one.kept.lanes[0] in locked and one.id not in long]
    first: dict[bool, dict[bytes, int]] = {True: {}, False: {}}
    for one in reversed([one for one in every if one not in rows]):
        first[one.id in long].update(dict.fromkeys(one.kept.keys, one.id))
    choice = choose(rows, locked, Before(first[True], first[False]))
    applied = {one.id for one in choice.free}
    assert sorted(one.id for one in choice.free + choice.later + choice.behind) == [one.id for one in rows]
    assert all(locked.issuperset(one.kept.lanes) for one in choice.behind)
    for one in every:
        if one.id not in applied:
            continue
        assert locked.issuperset(one.kept.lanes)
        before = [other for other in every if other.id < one.id and set(other.kept.keys) & set(one.kept.keys)]
        assert all(other.id in applied for other in before), one
    # Nothing waits that could go: what is first of all its keys and has its lanes is applied.
    for one in rows:
        before = [other for other in every if other.id < one.id and set(other.kept.keys) & set(one.kept.keys)]
        assert before or one.id in applied or not locked.issuperset(one.kept.lanes)
