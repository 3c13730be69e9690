"""Which lanes are parked: lag is private, and who is alone is not parked for it."""

from hypothesis import given
from hypothesis import strategies as st

from worker.lanes import NOTHING, Backlog, Lane, Top
from worker.reading.lagging import Bounds, to_park

BOUNDS = Bounds(entries=1000, size=100_000, lane_entries=200, handlers=2)


def park(backlogs: dict[Lane, Backlog], bounds: Bounds = BOUNDS) -> dict[Lane, int]:
    """Choose, where each lane has had 5,000 entries altogether; returns what each may keep."""
    tops = {lane: Top("9-9", 5_000, 10**9) for lane in backlogs}
    return {lane: 5_000 - count for lane, count in to_park(backlogs, tops, bounds).items()}


def test_a_lane_above_its_limit_keeps_half_of_it() -> None:
    assert park({Lane("a", 0): Backlog(201, 0), Lane("a", 1): Backlog(200, 0)}) == {Lane("a", 0): 100}


def test_bytes_count_too() -> None:
    assert park({Lane("a", 0): Backlog(50, 20_001), Lane("a", 1): Backlog(50, 20_000)}) == {Lane("a", 0): 24}


def test_a_limit_of_lanes_above_that_of_all_does_not_stop_the_reading() -> None:
    bounds = BOUNDS._replace(lane_entries=5_000)
    assert park({Lane("a", 0): Backlog(501, 0)}, bounds) == {Lane("a", 0): 250}


def test_many_lanes_of_one_handler_do_not_use_up_everything() -> None:
    full = {Lane("a", n): Backlog(100, 0) for n in range(10)}
    assert park(full | {Lane("b", 0): NOTHING}) == {Lane("a", n): 25 for n in range(10)}


def test_who_is_alone_waits_for_the_source() -> None:
    full = {Lane("a", n): Backlog(100, 0) for n in range(10)}
    assert park(full, BOUNDS._replace(handlers=1)) == {}


def test_where_all_lag_alike_nobody_is_parked() -> None:
    full = {Lane(name, n): Backlog(100, 0) for n in range(5) for name in "ab"}
    assert park(full) == {}


backlogs = st.builds(lambda n, size: Backlog(n, n * size), st.integers(0, 400), st.integers(1, 100))
lanes = st.dictionaries(st.builds(Lane, st.sampled_from("abc"), st.integers(0, 7)), backlogs, max_size=24)


@given(lanes, st.integers(8, 2000), st.integers(1_000, 100_000), st.integers(1, 300))
def test_reading_goes_on_where_somebody_has_nothing_to_do(
    given_: dict[Lane, Backlog], entries: int, size: int, lane_entries: int
) -> None:
    bounds = Bounds(entries, size, lane_entries, handlers=4)  # one of four has no backlog at all
    keeps = park(given_, bounds)
    left = {
        lane: Backlog(keeps[lane], backlog.size * keeps[lane] // backlog.entries)
        if lane in keeps
        else backlog
        for lane, backlog in given_.items()
    }
    assert all(0 <= keep < given_[lane].entries for lane, keep in keeps.items())
    assert all(one.entries <= max(lane_entries, 1) for one in left.values())
    if not bounds.has_room(sum(given_.values(), NOTHING)):
        assert bounds.has_room(sum(left.values(), NOTHING))
