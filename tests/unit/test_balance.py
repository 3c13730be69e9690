"""Which lanes are handed to which worker: the burden gets even, and comes to rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.draining.balance import Measured, to_hand_over
from worker.lanes import Lane


def lanes(*loads: float) -> dict[Lane, float]:
    return {Lane("h", number): load for number, load in enumerate(loads)}


def test_a_worker_that_joins_is_given_lanes() -> None:
    given = to_hand_over("a", {"a": 4.0, "b": 0.0}, lanes(*[0.5] * 8))
    assert set(given.values()) == {"b"}
    assert len(given) == 2  # half of what is too much; the rest with the next sweep


def test_where_all_have_about_as_much_nothing_moves() -> None:
    assert to_hand_over("a", {"a": 2.2, "b": 2.0, "c": 1.9}, lanes(*[0.2] * 11)) == {}


def test_where_nobody_has_much_to_do_nothing_moves() -> None:
    assert to_hand_over("a", {"a": 0.2, "b": 0.0}, lanes(0.1, 0.1)) == {}


def test_one_hot_lane_stays_where_it_is_and_the_others_make_room() -> None:
    given = to_hand_over("a", {"a": 1.8, "b": 0.0}, lanes(1.0, 0.4, 0.4))
    assert Lane("h", 0) not in given
    assert given
    assert to_hand_over("a", {"a": 1.0, "b": 0.0}, lanes(1.0)) == {}


def test_a_worker_alone_keeps_everything() -> None:
    assert to_hand_over("a", {"a": 8.0}, lanes(*[1.0] * 8)) == {}


@given(st.lists(st.lists(st.floats(0.0, 1.0), max_size=12), min_size=2, max_size=8))
def test_sweeps_after_one_another_make_the_burden_more_even_and_come_to_rest(
    work: list[list[float]],
) -> None:
    has = {
        f"w{n}": {Lane(f"h{n}", number): load for number, load in enumerate(own)}
        for n, own in enumerate(work)
    }

    def loads() -> dict[str, float]:
        return {name: sum(own.values()) for name, own in has.items()}

    for _ in range(200):
        before, moved = loads(), False
        for name, own in has.items():
            for lane, to in to_hand_over(name, loads(), own).items():
                has[to][lane] = own.pop(lane)
                moved = True
        assert max(loads().values()) <= max(before.values()) + 1e-6
        if not moved:
            return
    pytest.fail("lanes go to and fro")


def test_a_load_is_of_lately() -> None:
    measured, lane = Measured(), Lane("h", 0)
    measured.spent(lane, 2.0)
    assert measured.after(2.0)[lane] == 1.0
    assert measured.after(2.0)[lane] == 0.5
    measured.forget(lane)
    assert measured.after(2.0) == {}
