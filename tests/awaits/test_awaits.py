"""A sample of the points at which a process is struck; `make awaits` strikes at all of them."""

import asyncio

import pytest

from tests.awaits.nursery import Role
from tests.awaits.points import choose, sample
from tests.awaits.run import run
from tests.awaits.stepping import place_of
from tests.awaits.story import Note, misfit
from tests.stack import Servers
from worker.lanes import Lanes

SEED = 3


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("role", ["listener", "worker"])
async def test_struck_while_it_stands_still_nothing_is_lost(shared: Servers, role: Role) -> None:
    outcome = await run(shared, role, seed=SEED, deeds=("kill", "flush"), most=2)
    assert not outcome.failed
    assert outcome.struck


def test_each_place_is_struck_at_its_first_and_last_visit_and_the_seed_repeats() -> None:
    points = choose({"here": 7, "there": 1}, 3, ["kill"])
    assert {(point.place, point.visit) for point in points} == {("here", 1), ("here", 7), ("there", 1)}
    assert {point.moment for point in points if point.place == "there"} == {"waits", "goes on"}
    assert points == choose({"there": 1, "here": 7}, 3, ["kill"])
    assert {point.place for point in sample(points, 2)} == {"here", "there"}


def test_a_place_is_the_innermost_line_of_ours_and_what_it_waits_in() -> None:
    class Slow:
        async def set(self, *_: object, **__: object) -> None:
            for _ in range(3):
                await asyncio.sleep(0)

    coro = Lanes.alive(type("L", (), {"redis": Slow(), "prefix": "p"})(), "w")
    coro.send(None)
    assert (place := place_of(coro)) is not None
    assert place.startswith("lanes.py:")
    assert "set" in place
    coro.close()
    stranger = Slow().set()
    stranger.send(None)
    assert place_of(stranger) is None
    stranger.close()


def test_what_was_lost_doubled_or_out_of_order_is_found() -> None:
    first, second = Note("INSERT", 1, 1, 0, None), Note("UPDATE", 1, 2, 3, 0)
    truncate, other = Note("TRUNCATE", None, None, None, None), Note("INSERT", 2, 3, 2, None)
    story = [first, second, truncate, other]
    assert misfit(story, story, "by_row") is misfit(story, story, "by_owner") is None
    # Order between keys is nobody's promise, but a TRUNCATE is of all keys.
    assert misfit([first, other], [other, first], "by_row") is None
    for wrong in (
        story[:3],
        [*story, other],
        [second, first, truncate, other],
        [first, second, other, truncate],
    ):
        assert misfit(story, wrong, "by_row")
        assert misfit(story, wrong, "by_owner")
