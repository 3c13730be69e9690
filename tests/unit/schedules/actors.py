"""Who acts in the model: two listeners and some drains, each stopped between any two of its steps.

What decides is the code that is shipped: the chain, meetings, the slot. Around it stands what listener and
drain do, in their order; each of the rules of world.py switches one part of that off.
"""

from dataclasses import dataclass, field

from tests.unit.schedules.world import LANES, BrokenError, Change, Entry, World
from worker.change import Position
from worker.draining.chain import is_hole
from worker.draining.meetings import Meeting, judge
from worker.lanes import Lane
from worker.positions import LaneRow
from worker.reading.slot_rule import slot_target

HANDLER = "h"
MOST_HELD = 6
"""Above it no call fails: what is held is to go again."""


@dataclass
class Reading:
    """What a listener knows, and nobody else."""

    generation: int
    token: int
    floor: Position
    server: int
    timeline: int
    read_to: int
    last: Position
    """Of the generation, as the writer remembers it."""
    next: int
    """Index of the commit that is read."""
    part: int = 0
    tops: dict[int, Position] = field(default_factory=dict)
    target: int | None = None
    """Recorded, and not yet moved to."""


class Listener:
    """Takes the lease, reads under a generation of its own, moves the slot; may sleep for long."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.reading: Reading | None = None
        self.token = 0
        self.asleep = False

    def kill(self) -> None:
        """It is gone, with all it knew; the next one has another token."""
        self.reading, self.token, self.asleep = None, 0, False

    def stop(self) -> None:
        """It sleeps past its lease, or wakes up."""
        self.asleep = not self.asleep
        if self.asleep and self.world.pg.token == self.token:
            self.world.pg.expired = True

    def step(self) -> None:
        """One step of whatever it is at."""
        if self.asleep:
            return
        if self.reading is None:
            self._begin()
        elif self.world.chance.random() < 0.75:
            self._enqueue(self.reading)
        else:
            self.tick(self.reading)

    def _begin(self) -> None:
        world, pg, rules = self.world, self.world.pg, self.world.rules
        if not pg.expired and pg.token != self.token:
            return  # stands by
        if pg.expired or not self.token:
            self.token = pg.token = world.name()
            pg.expired = False
        missed = pg.timeline != world.timeline or (rules.compares and world.slot > pg.target)
        if missed and world.locks:
            return
        start = world.slot
        floor = Position(start, -1 if rules.below else 0)
        generation = world.name() if rules.generation or not pg.generation else pg.generation
        world.redis.meta[generation] = (self.token, floor)
        if missed:
            self._record_gap(start)
        if rules.generation:
            for key in [key for key in world.redis.streams if key[0] == pg.generation]:
                del world.redis.streams[key]
        pg.generation, pg.floor, pg.reread = generation, floor, False
        pg.server, pg.timeline = world.server, world.timeline
        pg.target = start if missed else max(start, pg.target)
        at = next((n for n, one in enumerate(world.log) if one.lsn >= start), len(world.log))
        self.reading = Reading(generation, self.token, floor, world.server, world.timeline, start, floor, at)

    def _record_gap(self, start: int) -> None:
        world, pg = self.world, self.world.pg
        if not world.wronged:
            raise BrokenError("I5: a gap is recorded though nothing was lost")
        world.wronged = False
        begin = Position(start, -1)
        held = {change.uid for change in pg.held}
        for change in world.changes():
            if change.id < begin and change.uid not in held and change.uid not in pg.applied:
                pg.gone.add(change.uid)
        for lane in range(LANES):
            pg.arrived[lane] = None
            if pg.positions[lane] < begin or not world.rules.only_forward:
                pg.positions[lane] = begin

    # Reading

    def _enqueue(self, reading: Reading) -> None:
        """One change into its lanes, by one script."""
        world = self.world
        if (reading.server, reading.timeline) != (world.server, world.timeline):
            self.reading = None  # its connection is gone
            return
        if reading.next >= len(world.log):
            return
        commit = world.log[reading.next]
        if reading.part < len(commit.changes):
            change = commit.changes[reading.part]
            if not self._write(reading, change):
                return
            reading.part += 1
        if reading.part == len(commit.changes):
            reading.read_to, reading.next, reading.part = commit.end, reading.next + 1, 0

    def _write(self, reading: Reading, change: Change) -> bool:
        world, rules = self.world, self.world.rules
        redis = world.redis
        chance = world.chance.random()
        if chance < 0.05:
            return False  # out of memory, loading, away: nothing is known, and it is tried again
        token, last = redis.meta.get(reading.generation, (0, Position.ZERO))
        if rules.add_checks and token != reading.token:
            self.reading = None  # replaced, or Redis has lost it
            return False
        if rules.add_checks and last == change.id and change.lanes:
            pass  # the answer to this very batch was lost
        elif rules.add_checks and last != reading.last:
            self.reading = None
            return False
        else:
            self._add(reading, change)
            redis.meta[reading.generation] = (reading.token, change.id)
            if chance < 0.1:
                return False  # written, but nobody says so
        reading.last = change.id
        for lane in change.lanes:
            reading.tops[lane] = change.id
        return True

    def _add(self, reading: Reading, change: Change) -> None:
        redis = self.world.redis
        for lane in change.lanes:
            key = (reading.generation, lane)
            if change.id <= redis.tops.get(key, Position.ZERO):
                continue  # refused, and taken for a duplicate
            before = reading.tops.get(lane, reading.floor)
            redis.streams.setdefault(key, []).append(Entry(change, before))
            redis.tops[key] = change.id

    # Looking after

    def tick(self, reading: Reading) -> None:
        """Renew the lease, see whether all is what it was, move the slot."""
        world, pg = self.world, self.world.pg
        changed = (reading.server, reading.timeline) != (world.server, world.timeline)
        if reading.target is not None and not changed:
            world.slot, reading.target = max(world.slot, reading.target), None
            return
        if not world.rules.lease and pg.expired:
            pg.token, pg.expired = self.token, False
        if pg.token != self.token:
            self.reading, self.token = None, 0
            return
        pg.expired = False
        moved = world.rules.compares and world.slot > pg.target
        if changed or moved or (pg.reread and pg.generation == reading.generation) or self._lost(reading):
            self.reading = None
            return
        target = self._target(reading)
        if target > world.slot:
            if world.rules.recorded:
                pg.target = max(pg.target, target)
            reading.target = target

    def _lost(self, reading: Reading) -> bool:
        world = self.world
        meta = world.redis.meta.get(reading.generation)
        if world.rules.add_checks and world.rules.tails and (meta is None or meta[0] != reading.token):
            return True
        for lane, top in reading.tops.items():
            entries = world.redis.streams.get((reading.generation, lane), ())
            there = any(entry.change.id == top for entry in entries)
            if world.rules.tails and not there and world.pg.positions[lane] < top:
                return True
        return False

    def _target(self, reading: Reading) -> int:
        world = self.world
        positions = world.pg.positions
        if world.rules.slot == "redis":
            busy = [
                positions[lane].lsn
                for lane in range(LANES)
                if world.redis.streams.get((reading.generation, lane))
            ]
            return min([reading.read_to, *busy])
        if world.rules.slot == "rows":
            return min(reading.read_to, *(position.lsn for position in positions))
        read_to = reading.read_to
        if world.rules.slot == "part" and reading.part:
            read_to = world.log[reading.next].end
        lanes = {Lane(HANDLER, lane): position for lane, position in enumerate(positions)}
        return slot_target({Lane(HANDLER, lane): top for lane, top in reading.tops.items()}, lanes, read_to)


class Drain:
    """One worker's pass over a lane: lock, read, apply and commit, trim."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.lane = -1
        self.kill()

    def kill(self) -> None:
        """It is gone; Postgres rolls back."""
        if self.world.locks.get(self.lane) is self:
            del self.world.locks[self.lane]
        self.stage = "lock"
        self.frozen = False
        self.entries: list[Entry] = []
        self.trim_to = (0, Position.ZERO)
        """Generation and position: also where nothing was applied, for a trim may have been missed."""
        self.lane = -1

    def freeze(self) -> None:
        """It does nothing for long, or wakes up; its lock ends meanwhile."""
        self.frozen = not self.frozen
        if self.frozen and self.world.locks.get(self.lane) is self and self.world.chance.random() < 0.5:
            del self.world.locks[self.lane]

    def step(self) -> None:
        """One step of its pass."""
        if self.frozen:
            return
        if self.stage in ("read", "commit") and self.world.locks.get(self.lane) is not self:
            self.kill()  # its transaction was ended
        getattr(self, f"_{self.stage}")()

    def _lock(self) -> None:
        world, pg = self.world, self.world.pg
        lane = world.chance.randrange(LANES)
        if lane in world.locks:
            return
        same = (pg.server, pg.timeline) == (world.server, world.timeline)
        if not pg.generation or (world.rules.same_server and not same):
            return
        self.lane, world.locks[lane] = lane, self
        # Under READ COMMITTED all that is read after the lock is what the last holder left.
        self.position, self.generation, self.floor = pg.positions[lane], pg.generation, pg.floor
        self.stage = "read"

    def _read(self) -> None:
        world = self.world
        entries = world.redis.streams.get((self.generation, self.lane), [])
        most = world.chance.randrange(1, 5)
        self.entries = [entry for entry in entries if entry.change.id > self.position][:most]
        self.stage = "commit"

    def _commit(self) -> None:
        world, pg = self.world, self.world.pg
        self._retry()
        entries = self.entries
        if world.rules.visible:
            unseen = [n for n, entry in enumerate(entries) if entry.change.id.lsn in world.unseen]
            entries = entries[: min(unseen, default=len(entries))]
        before = self.position
        for entry in entries:
            if is_hole(before, entry.previous, self.floor) and world.rules.chain:
                pg.reread = True
                self.kill()
                return
            if len(entry.change.lanes) > 1 and world.rules.meets:
                if before == self.position:
                    self._meet(entry.change)
                break
            if len(entry.change.lanes) == 1 or entry.change.lanes[0] == self.lane:
                self._handle(entry.change)
            before = entry.change.id
            if world.rules.together:
                pg.positions[self.lane] = before
        self.trim_to = (self.generation, before)
        if world.rules.together:
            del world.locks[self.lane]
        self.stage = "trim"

    def _trim(self) -> None:
        world = self.world
        generation, position = self.trim_to
        if not world.rules.together and world.locks.get(self.lane) is self:
            world.pg.positions[self.lane] = max(position, world.pg.positions[self.lane])
        key = (generation, self.lane)
        if key in world.redis.streams:
            kept = [entry for entry in world.redis.streams[key] if entry.change.id > position]
            world.redis.streams[key] = kept
        self.kill()

    def _meet(self, change: Change) -> None:
        world, pg = self.world, self.world.pg
        pg.arrived[self.lane] = change.id
        others = [lane for lane in change.lanes if lane != self.lane]
        if self.lane > others[0]:
            return
        rows = [
            LaneRow(pg.positions[lane], pg.arrived[lane], 0, 0) for lane in others if lane not in world.locks
        ]
        meeting = judge(change.id, len(others), rows)
        if meeting is Meeting.MISSED:
            raise BrokenError("I7: another lane has passed the change alone")
        if meeting is Meeting.READY:
            self._handle(change)
            for lane in change.lanes:
                pg.positions[lane] = change.id
                pg.arrived[lane] = None

    # Calling

    def _handle(self, change: Change) -> None:
        """Hold it behind an earlier one of its keys, or call for it."""
        world, pg = self.world, self.world.pg
        waits = any(set(one.keys) & set(change.keys) for one in pg.held)
        fails = world.chance.random() < 0.15 and len(pg.held) < MOST_HELD
        if (waits and world.rules.queues) or fails:
            pg.held.append(change)
        else:
            world.take_effect(change)

    def _retry(self) -> None:
        world, pg = self.world, self.world.pg
        for n, change in enumerate(pg.held):
            others = [lane for lane in change.lanes if lane != self.lane]
            first = not any(set(one.keys) & set(change.keys) for one in pg.held[:n])
            if change.lanes[0] == self.lane and first and not any(lane in world.locks for lane in others):
                if world.chance.random() < 0.7:
                    del pg.held[n]
                    world.take_effect(change)
                return
