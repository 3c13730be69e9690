"""Which changes several lanes take together: of each lane a beginning, and a shared one by all of them."""

import random
from collections.abc import Mapping, Sequence

import pytest

from worker.change import Position
from worker.draining.joint import merge
from worker.lanes import Entry, Read


def lanes_of(changes: Sequence[tuple[int, ...]], *, keys: bool = True) -> dict[int, list[Read]]:
    """Put changes, given by their lanes, into their lanes."""
    made: dict[int, list[Read]] = {}
    for n, numbers in enumerate(changes):
        for place, number in enumerate(sorted(numbers)):
            mine = made.setdefault(number, [])
            entry = Entry(
                "", tuple(sorted(numbers)), (b"k",) if keys else (), "wal", b"x", len(mine) + 1, 0, 0.0,
                changes=int(place == 0),
            )  # fmt: skip
            mine.append(Read(Position(n + 1, 0), entry))
    return made


def taken(lanes: Mapping[int, Sequence[Read]], most: int = 100) -> list[int]:
    return [read.position.lsn for read in merge(lanes, most).batch]


def test_what_several_lanes_hold_is_taken_in_order_and_a_shared_change_once() -> None:
    lanes = lanes_of([(0,), (1,), (0, 1), (1,), (0,)])
    joint = merge(lanes, 100)
    assert [read.position.lsn for read in joint.batch] == [1, 2, 3, 4, 5]
    assert sum(read.entry.changes for read in joint.batch) == 5
    assert {number: read.position.lsn for number, read in joint.lasts.items()} == {0: 5, 1: 4}
    assert (joint.wanted, joint.behind) == (set(), set())


def test_a_lane_that_is_not_there_stops_those_that_share_a_change_with_it_and_no_others() -> None:
    lanes = lanes_of([(0,), (0, 2), (1,), (0, 1), (1,), (3,)])
    del lanes[2]
    joint = merge(lanes, 100)
    assert [read.position.lsn for read in joint.batch] == [1, 3, 6]
    assert joint.wanted == {2}
    assert joint.behind == {0, 1}


def test_a_shared_change_that_one_lane_has_lost_is_not_taken() -> None:
    lanes = lanes_of([(0, 1), (1,), (0,)])
    del lanes[1][0]
    assert taken(lanes) == []  # nor what comes after it in either


def test_no_more_than_asked_for() -> None:
    assert taken(lanes_of([(0,), (0, 1), (1,)]), most=2) == [1, 2]


def test_a_change_of_all_keys_is_never_taken() -> None:
    assert taken(lanes_of([(0, 1)], keys=False)) == []
    assert merge(lanes_of([(0, 1)], keys=False), 9).wanted == set()


@pytest.mark.parametrize("seed", range(200))
def test_of_each_lane_a_beginning_and_nothing_before_its_turn(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(1, 5)
    changes = [
        tuple(rng.sample(range(count), min(count, rng.choice([1, 1, 2, 3]))))
        for _ in range(rng.randrange(30))
    ]
    lanes = lanes_of(changes)
    for reads in lanes.values():  # as much of each as was read
        del reads[rng.randrange(len(reads) + 1) :]
    for number in rng.sample(range(count), rng.randrange(count)):
        lanes.pop(number, None)
    joint = merge(lanes, rng.choice([1, 5, 100]))
    order = [read.position for read in joint.batch]
    assert order == sorted(set(order))
    for number, reads in lanes.items():
        mine = [read.position for read in joint.batch if number in read.entry.lanes]
        assert mine == [read.position for read in reads[: len(mine)]]
        assert (number in joint.lasts) == bool(mine)
        assert not mine or joint.lasts[number] == reads[len(mine) - 1]
        assert (number in joint.behind) == (0 < len(mine) < len(reads))
    assert all(lanes.keys() >= set(read.entry.lanes) for read in joint.batch)
