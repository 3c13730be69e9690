"""Up to where the slot may move: each way to get it wrong, and random schedules over a small model."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from worker.change import Position
from worker.lanes import Lane
from worker.reading.slot_rule import slot_target

A, B, C = Lane("h", 0), Lane("h", 1), Lane("other", 0)


def at(lsn: int, ordinal: int = 0) -> Position:
    return Position(lsn, ordinal)


def test_when_every_lane_has_passed_the_slot_moves_to_what_was_read() -> None:
    assert slot_target({A: at(100, 3), B: at(90)}, {A: at(100, 3), B: at(95)}, 120) == 120


def test_the_slowest_lane_decides() -> None:
    last = {A: at(100), B: at(110), C: at(115)}
    assert slot_target(last, {A: at(50, 2), B: at(70), C: at(115)}, 120) == 50


def test_a_lane_with_entries_of_one_commit_left_keeps_that_commit() -> None:
    assert slot_target({A: at(100, 7)}, {A: at(100, 6)}, 120) == 100


def test_lanes_that_are_empty_in_redis_are_not_passed_by_that() -> None:
    """After a flush only the positions count, and they stand where they stood."""
    assert slot_target({A: at(100)}, {A: at(40, -1)}, 120) == 40


def test_a_lane_without_changes_holds_nothing_up() -> None:
    assert slot_target({A: at(100)}, {A: at(100), B: at(5, -1)}, 120) == 120


def test_the_old_row_of_an_idle_lane_holds_nothing_up_after_a_new_start() -> None:
    assert slot_target({}, {A: at(60), B: at(5, -1)}, 120) == 120


def test_what_is_read_in_part_is_not_read() -> None:
    """A commit at 100 of which one entry is enqueued and applied, while the rest waits for room."""
    assert slot_target({A: at(100, 0)}, {A: at(100, 0)}, 95) == 95


def test_a_lane_that_is_far_ahead_of_what_was_read_moves_nothing() -> None:
    assert slot_target({A: at(100)}, {A: at(900)}, 95) == 95


def test_a_lane_whose_handler_is_gone_holds_nothing_up() -> None:
    assert slot_target({A: at(100)}, {}, 120) == 120


# The model: a log, lanes in Redis with a chain, positions in Postgres, a listener that is killed.

LANES = (A, B, C)


class Commit(NamedTuple):
    lsn: int
    end: int
    """Often the LSN of the next commit."""
    entries: tuple[tuple[Position, Lane], ...]


class Entry(NamedTuple):
    id: Position
    previous: Position


Rule = Callable[["Model"], int]


def the_rule(model: "Model") -> int:
    return slot_target(model.last, model.positions, model.read_to)


def by_what_redis_holds(model: "Model") -> int:
    busy = [model.positions[lane].lsn for lane, entries in model.queues.items() if entries]
    return min([model.read_to, *busy])


def by_all_rows(model: "Model") -> int:
    return min(model.read_to, *(position.lsn for position in model.positions.values()))


def past_a_commit_in_part(model: "Model") -> int:
    part = [model.log[model.next].end] if model.part else []
    return slot_target(model.last, model.positions, max([model.read_to, *part]))


@dataclass
class Model:
    chance: random.Random
    rule: Rule = the_rule
    slot: int = 100
    log: list[Commit] = field(default_factory=list)
    positions: dict[Lane, Position] = field(default_factory=lambda: dict.fromkeys(LANES, at(100, -1)))
    applied: set[tuple[Position, Lane]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A generation: nothing enqueued, read from where the slot stands."""
        self.floor = at(self.slot, -1)
        self.queues: dict[Lane, list[Entry]] = {lane: [] for lane in LANES}
        self.last: dict[Lane, Position] = {}
        self.read_to = self.slot
        self.next = next((n for n, one in enumerate(self.log) if one.lsn >= self.slot), len(self.log))
        self.part = 0

    def commit(self) -> None:
        lsn = self.log[-1].end if self.log else 100
        lsn += self.chance.choice((0, 0, 8))
        width = self.chance.randrange(4)
        entries = tuple(
            (at(lsn, n), self.chance.choice(LANES[: self.chance.choice((1, 3))])) for n in range(width)
        )
        self.log.append(Commit(lsn, lsn + 10, entries))

    def enqueue(self) -> None:
        """One entry: back-pressure may stop within a commit."""
        if self.next == len(self.log):
            return
        commit = self.log[self.next]
        if self.part < len(commit.entries):
            id_, lane = commit.entries[self.part]
            self.queues[lane].append(Entry(id_, self.last.get(lane, self.floor)))
            self.last[lane] = id_
            self.part += 1
        if self.part == len(commit.entries):
            self.read_to, self.next, self.part = commit.end, self.next + 1, 0

    def drain(self) -> None:
        lane = self.chance.choice(LANES)
        for entry in self.queues[lane][: self.chance.randrange(1, 4)]:
            position = self.positions[lane]
            if entry.id > position:
                if entry.previous > position and entry.previous != self.floor:
                    self.begin()  # a hole: read again
                    return
                self.applied.add((entry.id, lane))
                self.positions[lane] = entry.id
            self.queues[lane].pop(0)

    def advance(self) -> None:
        self.slot = max(self.slot, self.rule(self))

    def flush(self) -> None:
        """Redis loses everything; the listener goes on, not knowing."""
        for entries in self.queues.values():
            entries.clear()

    def lost(self) -> list[tuple[Position, Lane]]:
        """What the slot has passed and a lane has not."""
        passed = [commit for commit in self.log if commit.lsn < self.slot]
        return [entry for commit in passed for entry in commit.entries if entry not in self.applied]


STEPS: Mapping[Callable[[Model], None], int] = {
    Model.commit: 20,
    Model.enqueue: 40,
    Model.drain: 40,
    Model.advance: 15,
    Model.begin: 2,
    Model.flush: 2,
}


def losing_schedules(rule: Rule, schedules: int) -> int:
    """How many schedules make the slot pass what a lane has not passed."""
    losing = 0
    for seed in range(schedules):
        model = Model(random.Random(seed), rule)
        for step in model.chance.choices(list(STEPS), list(STEPS.values()), k=150):
            step(model)
            if model.lost():
                losing += 1
                break
    return losing


def test_no_schedule_makes_the_slot_pass_what_a_lane_has_not_passed() -> None:
    assert losing_schedules(the_rule, 400) == 0


@pytest.mark.parametrize("rule", [by_what_redis_holds, past_a_commit_in_part])
def test_the_schedules_find_a_wrong_rule(rule: Rule) -> None:
    assert losing_schedules(rule, 100) > 0


def end_of(seed: int, rule: Rule) -> Model:
    """A schedule, and then time enough for everything."""
    model = Model(random.Random(seed), rule)
    for step in model.chance.choices(list(STEPS), list(STEPS.values()), k=100):
        step(model)
    model.begin()
    while model.next < len(model.log):
        model.enqueue()
    while any(model.queues.values()):
        model.drain()
    model.advance()
    return model


def test_when_all_is_applied_the_slot_stands_at_the_end_of_what_was_read() -> None:
    for seed in range(200):
        model = end_of(seed, the_rule)
        assert model.slot == model.read_to
        assert model.lost() == []


def test_a_rule_that_asks_idle_lanes_holds_the_slot_for_ever() -> None:
    assert any(end_of(seed, by_all_rows).slot < end_of(seed, by_all_rows).read_to for seed in range(50))
