"""Several lanes of a change handler applied together, where changes move rows from one lane key to another.

A change of several lanes needs the rows of all of them. Met one by one, lanes that exchange many rows would
wait for each other at each; so a pass that comes to such a change takes further lanes along, as far as
their rows are free, and goes on with all of them in the order of positions. Nobody waits for a row here:
what cannot be had is left to the meeting (meetings.py), which always comes about.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from worker import positions
from worker.change import Position
from worker.draining.chain import is_hole
from worker.draining.passes import Turn
from worker.lanes import Lane, Lanes, Read

PATIENCE_SECONDS = 0.05
"""For other passes to end; one with a slow handler holds up nobody for longer."""

Cut = Callable[[Turn, list[Read]], Awaitable[list[Read]]]
"""Cuts off what cannot be seen yet."""


class Gate:
    """Of one handler's passes in this process: lets one of them at a time take lanes along.

    Every pass has a row locked from its beginning. With all lanes at work nobody would ever find the others'
    rows free: so no pass begins while one takes lanes along, and those under way are given a moment to end.
    """

    def __init__(self) -> None:
        self._taking = asyncio.Lock()
        self._under_way = 0
        self._alone = asyncio.Event()

    @asynccontextmanager
    async def passing(self) -> AsyncIterator[None]:
        """Make a pass, after whoever is taking lanes along has them."""
        async with self._taking:
            self._under_way += 1
        self._alone.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if self._under_way <= 1:
                self._alone.set()

    @asynccontextmanager
    async def taking(self) -> AsyncIterator[bool]:
        """Take lanes along, in a pass; False where another pass does, which may want this one's lane."""
        if self._taking.locked():
            yield False
            return
        async with self._taking:
            if self._under_way > 1:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PATIENCE_SECONDS):
                        await self._alone.wait()
            yield True


class Joint(NamedTuple):
    """What can be applied in one transaction, for which these lanes are locked."""

    batch: list[Read]
    """In the order of positions; a change of several lanes stands in it once."""
    lasts: dict[int, Read]
    """Of each lane that moves, its own entry up to which."""
    behind: set[int]
    """Of these lanes, those that have more to do."""
    wanted: set[int]
    """Lanes without which it cannot go further."""


def merge(lanes: Mapping[int, Sequence[Read]], most: int) -> Joint:
    """Choose what can be applied of the heads of some lanes, in the order of positions. Pure.

    A change is taken when it is the next one of all its lanes. One that is not stops those lanes, and no
    others: of each lane a beginning is taken, without a hole.

    Args:
        lanes: for each lane that is locked, what follows its position.
        most: changes, at most.
    """
    at = dict.fromkeys(lanes, 0)
    going = {number for number, reads in lanes.items() if reads}
    joint = Joint([], {}, set(), set())
    while going and len(joint.batch) < most:
        number = min(going, key=lambda one: lanes[one][at[one]].position)
        position, entry = lanes[number][at[number]]
        concerned = set(entry.lanes)
        heads = {one: lanes[one][at[one]] for one in concerned & going}
        if (
            not entry.keys
            or len(heads) < len(concerned)
            or any(head.position != position for head in heads.values())
        ):
            # Without keys it stands for all keys: that needs every lane, and is never hurried.
            joint.wanted.update(concerned - lanes.keys() if entry.keys else ())
            going -= concerned
            continue
        # One of the entries counts the change.
        joint.batch.append(max(heads.values(), key=lambda head: head.entry.changes))
        joint.lasts.update(heads)
        for one in concerned:
            at[one] += 1
            if at[one] == len(lanes[one]):
                going.discard(one)
    joint.behind.update(number for number in joint.lasts if at[number] < len(lanes[number]))
    return joint


def has_hole(before: Position, reads: Sequence[Read], floor: Position) -> bool:
    """Tell whether something is missing before or among entries, the first of which follows a position."""
    for read in reads:
        if is_hole(before, Position.parse(read.entry.previous), floor):
            return True
        before = read.position
    return False


async def join(
    turn: Turn,
    own: list[Read],
    store: Lanes,
    most: int,
    cut: Cut,
    shunned: Collection[int] = (),
    *,
    parks: bool = False,
) -> Joint | None:
    """Take further lanes along at a change of several lanes.

    Args:
        turn: holds the row of its lane, and of all lanes taken along until it ends.
        own: what follows the lane's position, without a hole; the first is a change of several lanes.
        store: the lanes in Redis.
        most: changes, at most.
        cut: see Cut.
        shunned: lanes that are not to be taken along.
        parks: they are taken along to be parked.

    Returns:
        What to apply, or None where the lanes must meet: one is drained by somebody else just now, has a
        hole, or is being parked.
    """
    taken = {turn.lane.number: own}
    joint = merge(taken, most)
    refused = set(shunned)
    while new := sorted(joint.wanted - refused):
        rows = await positions.lock_others(turn.session, turn.lane.handler, new)
        for number in new:
            row = rows.get(number)
            reads = None if row is None else await _behind(turn, number, row, store, most, cut, parks=parks)
            if reads is None:
                refused.add(number)
            else:
                taken[number] = reads
        joint = merge(taken, most)
    return joint if turn.lane.number in joint.lasts else None


async def _behind(
    turn: Turn, number: int, row: positions.LaneRow, store: Lanes, most: int, cut: Cut, *, parks: bool
) -> list[Read] | None:
    """Read what follows the position of another lane; None where its own pass has to look at it first."""
    if row.parked > 0 and not parks:
        return None  # it came before all that is in the stream
    lane = Lane(turn.lane.handler, number)
    reads, park_to, _ = await store.read(str(turn.source.generation), lane, row.position, most)
    if reads and reads[0].entry.count <= park_to and not parks:
        return None
    if has_hole(row.position, reads, turn.source.floor):
        return None
    return await cut(turn, reads)
