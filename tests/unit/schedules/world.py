"""A small model of what delivery stands on: log and slot, Postgres, Redis; and what must hold of it.

It has no I/O and no time. Who acts in it is in actors.py. Raises BrokenError as soon as an invariant is hurt.
"""

import random
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple

from worker.change import Position

LANES = 3
KEYS = 6
START = 100
BEGIN = Position(START, -1)


class BrokenError(Exception):
    """An invariant does not hold."""


@dataclass(frozen=True)
class Rules:
    """Every repair can be switched off, to see that the schedules find out."""

    chain: bool = True
    """An entry is applied only if the one that it names is."""
    add_checks: bool = True
    """Writing compares the last id of the generation with the writer's."""
    generation: bool = True
    """Every reading has lanes of its own name."""
    same_server: bool = True
    """A drain looks whether the server is the one under which the generation began."""
    tails: bool = True
    """The listener looks for the ends of lanes."""
    lease: bool = True
    """A lease is renewed only by the token that took it."""
    visible: bool = True
    """Nothing is applied that others cannot see yet."""
    queues: bool = True
    """Later changes of a held key are held behind it."""
    meets: bool = True
    """A change of two lanes waits for both."""
    together: bool = True
    """Effects and position are one transaction."""
    below: bool = True
    """A boundary is below the first change of its commit, not on it."""
    only_forward: bool = True
    """A lane that is beyond the slot when a gap is recorded is not put back."""
    recorded: bool = True
    """A target is recorded before the slot moves."""
    compares: bool = True
    """A slot beyond its record is a gap."""
    slot: str = "rule"
    """Or one of those that are wrong; see actors.py."""


class Change(NamedTuple):
    """One change of one handler."""

    id: Position
    uid: int
    """Ids may repeat after a restore; this does not."""
    keys: tuple[int, ...]
    lanes: tuple[int, ...]


class Commit(NamedTuple):
    lsn: int
    end: int
    """Often the LSN of the next commit."""
    changes: tuple[Change, ...]


class Entry(NamedTuple):
    change: Change
    previous: Position


@dataclass
class Postgres:
    """What is committed there; a restore brings all of it back as it was."""

    positions: list[Position]
    arrived: list[Position | None]
    held: list[Change] = field(default_factory=list)
    applied: dict[int, Change] = field(default_factory=dict)
    """By uid."""
    newest: dict[int, Position] = field(default_factory=dict)
    """By key: the last that was applied."""
    gone: set[int] = field(default_factory=set)
    """Uids inside a recorded gap."""
    generation: int = 0
    floor: Position = BEGIN
    server: int = 0
    timeline: int = 0
    target: int = START
    token: int = 0
    expired: bool = True
    reread: bool = False


@dataclass
class Redis:
    """Nothing in it is evidence of anything."""

    streams: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)
    tops: dict[tuple[int, int], Position] = field(default_factory=dict)
    """Of streams: survive trimming, not deletion."""
    meta: dict[int, tuple[int, Position]] = field(default_factory=dict)
    """By generation: token, and last id written."""


class World:
    """Log, slot, Postgres and Redis, and the oracle that watches them."""

    def __init__(self, chance: random.Random, rules: Rules) -> None:
        self.chance = chance
        self.rules = rules
        self.log: list[Commit] = []
        self.alive: set[int] = set()
        """Uids of the log as it is."""
        self.unseen: set[int] = set()
        """Commits that are decoded before others see them."""
        self.slot = START
        self.server = 0
        self.timeline = 0
        self.pg = Postgres([BEGIN] * LANES, [None] * LANES)
        self.redis = Redis()
        self.locks: dict[int, object] = {}
        self.names = 0
        self._saved: tuple[Postgres, int, int] | None = None
        self._copy: Redis | None = None
        self.wronged = False
        """Somebody has done what makes a gap."""
        self._slot_checked = START
        """Below it the slot was moved by somebody else."""
        self._checked: tuple[object, ...] = ()

    def name(self) -> int:
        """Make a name that nobody has had."""
        self.names += 1
        return self.names

    @property
    def end(self) -> int:
        """Where the log ends."""
        return self.log[-1].end if self.log else START

    # What happens by itself

    def commit(self) -> None:
        """Somebody commits; a change with two keys may belong to two lanes."""
        lsn = self.end + self.chance.choice((0, 0, 8))
        changes = []
        for ordinal in range(self.chance.randrange(4)):
            keys = tuple(sorted(self.chance.sample(range(KEYS), self.chance.choice((1, 1, 1, 2)))))
            lanes = tuple(sorted({key % LANES for key in keys}))
            changes.append(Change(Position(lsn, ordinal), self.name(), keys, lanes))
        self.log.append(Commit(lsn, lsn + 10, tuple(changes)))
        self.alive.update(change.uid for change in changes)
        if self.chance.random() < 0.3:
            self.unseen.add(lsn)

    def see(self) -> None:
        """What was committed can be seen at last."""
        if self.unseen:
            self.unseen.discard(min(self.unseen))

    # What Redis loses

    def flush(self) -> None:
        """FLUSHALL."""
        self.redis = Redis()

    def lose_lane(self) -> None:
        """A key is evicted or deleted."""
        if self.redis.streams:
            key = self.chance.choice(sorted(self.redis.streams))
            del self.redis.streams[key]
            self.redis.tops.pop(key, None)

    def lose_tail(self) -> None:
        """The newest entries of a lane are gone, as if they had never been."""
        if self.redis.streams:
            key = self.chance.choice(sorted(self.redis.streams))
            kept = self.redis.streams[key][: -self.chance.randrange(1, 3)]
            self.redis.streams[key] = kept
            self.redis.tops[key] = kept[-1].change.id if kept else Position.ZERO

    def copy_redis(self) -> None:
        """A replica has what Redis has now."""
        self._copy = deepcopy(self.redis)

    def promote_copy(self) -> None:
        """The replica, which is behind, becomes Redis."""
        if self._copy is not None:
            self.redis, self._copy = self._copy, None

    # What Postgres does

    def restart(self) -> None:
        """Postgres crashes: the slot may stand a little further back than before."""
        self.server = self.name()
        self.locks.clear()
        if self.chance.random() < 0.5:
            self.slot = max(START, self.slot - 10)
        self.unseen.clear()

    def save(self) -> None:
        """A backup, or what a standby has by now."""
        self._saved = (deepcopy(self.pg), len(self.log), self.slot)

    def restore(self) -> None:
        """The backup becomes the database, with a slot as old as itself, an older one, or none."""
        if self._saved is None:
            return
        pg, length, slot = self._saved
        self.pg = deepcopy(pg)
        for commit in self.log[length:]:
            self.alive.difference_update(change.uid for change in commit.changes)
        del self.log[length:]
        self.server = self.timeline = self.name()
        self.locks.clear()
        self.unseen.clear()
        self.wronged = True
        self.slot = self.chance.choice((slot, max(START, slot - 10), self.end))
        self._slot_checked = self.slot  # a gap, which is yet to be recorded

    def steal(self) -> None:
        """Somebody else moves the slot."""
        if self.chance.random() < 0.3 and self.log:
            self.slot = max(self.slot, self.chance.choice(self.log).end)
            self.wronged = True
            self._slot_checked = self.slot  # ours is to notice, not to have prevented it

    # What must hold

    def take_effect(self, change: Change) -> None:
        """Apply a change in the transaction of its lanes.

        Raises:
            BrokenError: it must not be.
        """
        pg = self.pg
        if change.uid not in self.alive:
            raise BrokenError("I3: a change of another history is applied")
        if change.uid in pg.applied:
            raise BrokenError("I1: applied twice")
        if change.id.lsn in self.unseen:
            raise BrokenError("I8: applied before it can be seen")
        for key in change.keys:
            if pg.newest.get(key, Position.ZERO) > change.id:
                raise BrokenError("I6: a later change of the key came first")
            pg.newest[key] = change.id
        pg.applied[change.uid] = change

    def check(self) -> None:
        """See that prefix and slot are as they must be.

        Raises:
            BrokenError: they are not.
        """
        pg = self.pg
        state = (self.slot, *pg.positions, len(pg.held), len(pg.applied))
        if state == self._checked:
            return
        self._checked = state
        held = {change.uid for change in pg.held}
        for commit in self.log:
            for change in commit.changes:
                passed = [pg.positions[lane] >= change.id for lane in change.lanes]
                known = change.uid in pg.applied or change.uid in held or change.uid in pg.gone
                if any(passed) and not known:
                    raise BrokenError("I2: a lane has passed what nobody has handled")
                if self._slot_checked <= commit.lsn < self.slot and not (all(passed) or known):
                    raise BrokenError("I4: the slot has passed what a lane has not")

    def check_end(self) -> None:
        """See that all is handled once nothing more goes wrong.

        Raises:
            BrokenError: it is not.
        """
        pg = self.pg
        if pg.held:
            raise BrokenError("I9: what is held is never tried again")
        for change in self.changes():
            if change.uid not in pg.applied and change.uid not in pg.gone:
                raise BrokenError("I9: a change is never handled")
        if self.slot < self.end:
            raise BrokenError("I9: the slot stands for ever")

    def changes(self) -> Iterable[Change]:
        """All changes of the log."""
        return (change for commit in self.log for change in commit.changes)
