"""Within a pass: parks what stands in a lane, and applies what is parked.

A lane that lags or is paused must not fill Redis and hold up the others. Its changes move to Postgres in the
transaction that moves its position; see worker/parked.py for how they wait there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import structlog

from worker import held, parked
from worker.draining.applying import Applying, Call, count
from worker.draining.calls import LaneBlockedError
from worker.draining.items import Item, KeyItem
from worker.draining.passes import Turn
from worker.held import HeldRow, Kept
from worker.lanes import Read
from worker.overtaking import Applied
from worker.retries import Failure

log = structlog.get_logger(__name__)

AT_ONCE = 1_000
"""Entries parked in one transaction."""


class _Unparked(NamedTuple):
    """A parked change, or key, with what its handler is called with."""

    row: HeldRow
    item: Item | KeyItem


class Parking:
    """Parks for one handler."""

    def __init__(self, applying: Applying) -> None:
        self._applying = applying
        self._derives = applying.handler.kind == "derive"

    async def park(self, turn: Turn, batch: Sequence[Read]) -> None:
        """Move entries of the lane to Postgres."""
        lane, session = turn.lane, turn.session
        if turn.row.parked == 0:
            reason = "paused" if turn.source.paused else "too far behind"
            log.warning("lane is parked in Postgres", handler=lane.handler, lane=lane.number, reason=reason)
        if self._derives:
            counts, _ = count(batch, set())
            rows = await parked.park_keys(session, lane, counts, batch[-1].position)
            turn.progress.parked[lane.number] += rows
            turn.holds((lane.number,), rows)
            return
        changes = [
            Kept(read.entry.lanes, read.entry.keys, read.position, read.entry.source, read.entry.payload)
            for read in batch
        ]
        await parked.park(session, lane.handler, changes)
        for kept in changes:
            turn.progress.parked[kept.lanes[0]] += 1
            turn.holds(kept.lanes, 1)

    async def unpark(self, turn: Turn, most: int) -> None:
        """Apply the first parked changes of the lane.

        Raises:
            CallFailedError, TransactionSpoiltError: roll back, and make the pass again with more care.
            LaneBlockedError: roll back, and wait.
        """
        rows = await parked.first(turn.session, turn.lane, most)
        if not rows:
            turn.progress.parked[turn.lane.number] -= turn.row.parked  # a person has deleted them by hand
            return
        if turn.notes is not None:
            # A worker has died over the lane: as held changes they are called one by one.
            await self._to_held(turn, rows, due=True)
            return
        free = await self._free(turn, rows if self._derives else _one_history(rows))
        if not free:
            return
        if not turn.careful:
            try:
                items = await self._decoded(turn, free)
            except Exception as error:
                raise self._applying.trouble(error) from error
            await self._applying.whole(self._call(turn), items)
            await self._applied(turn, free)
            return
        items = await self._readable(turn, free)
        outcome = await self._applying.apart(
            turn,
            self._call(turn),
            items,
            lambda one: one.row.kept.keys,
            lambda one: ("held", one.row.id),
        )
        await self._applied(turn, [one.row for one in outcome.applied])
        for one, failure in outcome.failed:
            await self._failed(turn, one.row, failure)
        # Those not tried yet stay parked.
        await self._to_held(turn, [one.row for one in outcome.behind], due=False)

    async def _free(self, turn: Turn, rows: Sequence[HeldRow]) -> list[HeldRow]:
        """Leave to the held changes what waits behind one of them, and what needs the rows of other lanes."""
        blocked: dict[bytes, int] = {}
        wall: int | None = None
        if turn.row.holding > turn.row.parked:
            blocked = await parked.others(
                turn.session, turn.lane, {key for row in rows for key in row.kept.keys}
            )
            wall = await parked.wall(turn.session, turn.lane.handler)
        free, behind, alone = [], [], []
        for row in rows:
            keys = row.kept.keys
            if any(blocked.get(key, row.id) < row.id for key in keys) or (wall or row.id) < row.id:
                behind.append(row)
            elif len(row.kept.lanes) > 1 or not keys:
                alone.append(row)
                wall = wall if keys else row.id
            else:
                free.append(row)
                continue
            for key in keys:
                blocked[key] = min(row.id, blocked.get(key, row.id))
        await self._to_held(turn, behind, due=False)
        await self._to_held(turn, alone, due=True)
        return free

    async def _to_held(self, turn: Turn, rows: Sequence[HeldRow], *, due: bool) -> None:
        if rows:
            await parked.to_held(turn.session, [row.id for row in rows], due=due)
            turn.progress.parked[turn.lane.number] -= len(rows)

    async def _applied(self, turn: Turn, rows: Sequence[HeldRow]) -> None:
        if not rows:
            return
        progress = turn.progress
        await parked.let_go(turn.session, [row.id for row in rows])
        progress.applied += sum(row.kept.changes for row in rows)
        progress.done += [Applied(row.kept.keys, row.kept.position) for row in rows]
        progress.parked[turn.lane.number] -= len(rows)
        turn.holds((turn.lane.number,), -len(rows))
        await self._promote(turn, rows)

    async def _failed(self, turn: Turn, row: HeldRow, failure: Failure) -> None:
        self._applying.tell(turn, failure)
        await held.failed_again(turn.session, row, failure)
        turn.progress.parked[turn.lane.number] -= 1
        if not failure.holds_back:
            turn.holds((turn.lane.number,), -1)
            await self._promote(turn, [row])

    async def _promote(self, turn: Turn, rows: Sequence[HeldRow]) -> None:
        if turn.row.holding > turn.row.parked:
            keys = sorted({key for row in rows for key in row.kept.keys})
            turn.progress.wake |= await held.promote(turn.session, turn.lane.handler, keys)

    # What the handler is called with

    async def _decoded(self, turn: Turn, rows: Sequence[HeldRow]) -> list[_Unparked]:
        decoder = self._applying.decoder
        if self._derives:
            return [
                _Unparked(row, KeyItem(row.kept.keys[0], decoder.key(row.kept.keys[0]), row.kept.changes))
                for row in rows
            ]
        items = await decoder.parked(turn.session, rows)
        return [_Unparked(row, item) for row, item in zip(rows, items, strict=True)]

    async def _readable(self, turn: Turn, rows: Sequence[HeldRow]) -> list[_Unparked]:
        """Decode one by one; hold what cannot be decoded, and behind it what comes after it of its keys."""
        items: list[_Unparked] = []
        behind: list[HeldRow] = []
        blocked: set[bytes] = set()
        for row in rows:
            if not blocked.isdisjoint(row.kept.keys):
                blocked.update(row.kept.keys)
                behind.append(row)
                continue
            try:
                async with turn.session.begin_nested():
                    items += await self._decoded(turn, [row])
            except Exception as error:
                failure = self._applying.judge(error)
                if failure is None:
                    raise LaneBlockedError from error
                await self._failed(turn, row, failure)
                if failure.holds_back:
                    blocked.update(row.kept.keys)
        await self._to_held(turn, behind, due=False)
        return items

    def _call(self, turn: Turn) -> Call[_Unparked]:
        keys, changes = self._applying.keys_call(turn), self._applying.changes_call(turn)

        async def call(items: Sequence[_Unparked]) -> None:
            if self._derives:
                await keys([one.item for one in items if isinstance(one.item, KeyItem)])
            else:
                await changes([one.item for one in items if isinstance(one.item, Item)])

        return call


def _one_history(rows: Sequence[HeldRow]) -> Sequence[HeldRow]:
    """End a batch where positions do not rise: after a restore they repeat, and name changes no longer."""
    for n in range(1, len(rows)):
        if rows[n].kept.position <= rows[n - 1].kept.position:
            return rows[:n]
    return rows
