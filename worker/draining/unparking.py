"""Within a pass: applies what is parked (worker/parked.py), in the order in which it was parked.

A change of several lanes needs the rows of all of them, as in the lanes themselves (joint.py): the pass takes
those lanes along, as far as their rows are free, and applies what is parked of all of them together. What
cannot be applied now either stays parked, because a moment later it can, or goes to the held changes, where
it waits for as long as an earlier change of its key does.
"""

from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from worker import held, parked, positions
from worker.draining.applying import Applying, Call, fate_of
from worker.draining.calls import LaneBlockedError, Traits
from worker.draining.items import Item, KeyItem
from worker.draining.joint import Gate
from worker.draining.notes import FEW, Notes, Suspicion, verdict
from worker.draining.passes import Turn
from worker.draining.retrying import Retrying
from worker.held import HeldRow
from worker.lanes import Lane
from worker.naming import Named
from worker.overtaking import Applied
from worker.parked import Before, Wall
from worker.positions import LaneRow
from worker.retries import Failure


@dataclass
class Choice:
    """What becomes of the first parked rows of some lanes."""

    free: list[HeldRow] = field(default_factory=list)
    """Applied now, in this order."""
    later: list[HeldRow] = field(default_factory=list)
    """Stay parked: another lane's row is not to be had just now, or what is before them is on its way."""
    behind: list[HeldRow] = field(default_factory=list)
    """Held behind an earlier one of their keys, which waits for a time or for a person."""
    alone: list[HeldRow] = field(default_factory=list)
    """Of all keys: held, and due when all before them is gone."""
    seen: int = 0
    """Rows, of all fates."""


def choose(
    rows: Sequence[HeldRow], lanes: Collection[int], before: Before, wall: Wall | None = None
) -> Choice:
    """Choose what can be applied of parked rows, so that the order of each key holds. Pure.

    Args:
        rows: the first of these lanes, in the order of ids; none between them is left out.
        lanes: whose rows are locked.
        before: for keys, the first of the waiting rows that are not among these.
        wall: the first of the waiting changes of all keys.
    """
    choice = Choice(seen=len(rows))
    held_from, later_from = dict(before.held), dict(before.moving)
    for row in rows:
        keys = row.kept.keys
        if not keys:
            choice.alone.append(row)
            wall = wall or Wall(row.id, waits_long=False)
        elif not set(row.kept.lanes).issubset(lanes):
            # Nor may it go to wait: what it would wait behind may be another lane's, which is just letting it
            # go, and has already looked for what waits.
            choice.later.append(row)
            _first(later_from, row)
        elif (wall is not None and wall.id < row.id and wall.waits_long) or _among(held_from, row):
            choice.behind.append(row)
            _first(held_from, row)
        elif (wall is not None and wall.id < row.id) or _among(later_from, row):
            choice.later.append(row)
            _first(later_from, row)
        else:
            choice.free.append(row)
    return choice


def _among(first: Mapping[bytes, int], row: HeldRow) -> bool:
    return any(first.get(key, row.id) < row.id for key in row.kept.keys)


def _first(first: MutableMapping[bytes, int], row: HeldRow) -> None:
    for key in row.kept.keys:
        first[key] = min(row.id, first.get(key, row.id))


class _Unparked(NamedTuple):
    """A parked change, or key, with what its handler is called with."""

    row: HeldRow
    item: Item | KeyItem


_TRAITS = Traits[_Unparked](
    lambda one: one.row.kept.keys,
    lambda one: ("held", one.row.id),
    lambda one: one.item.value if isinstance(one.item, KeyItem) else one.item.change,
)


class Unparking:
    """Applies what is parked for one handler.

    Args:
        applying: calls the handler.
        retrying: lets go on what waits behind what failed.
        gate: of the handler's passes.
        suspicions: lanes of which one is under suspicion are not taken along.
        batch: changes that a worker may have in hand when it dies.
    """

    def __init__(
        self,
        applying: Applying,
        retrying: Retrying,
        gate: Gate,
        suspicions: MutableMapping[Lane, Suspicion],
        batch: int,
    ) -> None:
        self._applying = applying
        self._retrying = retrying
        self._gate = gate
        self._suspicions = suspicions
        self._batch = batch
        self._derives = applying.handler.kind == "derive"

    async def unpark(self, turn: Turn, most: int) -> bool:
        """Apply the first parked changes of the lane; False where none of them can be applied just now.

        Raises:
            CallFailedError, TransactionSpoiltError: roll back, and make the pass again with more care.
            LaneBlockedError: roll back, and wait.
        """
        lane = turn.lane
        if turn.notes is not None:
            turn, most = await self._few(turn, turn.notes, most)
        rows = await parked.first(turn.session, lane.handler, (lane.number,), most)
        if not rows:
            turn.progress.parked[lane.number] -= turn.row.parked  # a person has deleted them by hand
            return True
        lanes = {lane.number: turn.row}
        if turn.notes is not None:
            choice = await self._chosen(turn, rows, lanes)
            # What needs other lanes is called for itself: nobody may be accused of what is another's fault.
            await self._single_out(turn, choice, [row for row in choice.later if len(row.kept.lanes) > 1])
            if choice.free:
                await turn.notes.begin_rows(choice.free[0].id, choice.free[-1].id)
        else:
            alone = all(len(row.kept.lanes) == 1 for row in rows)
            choice = await self._chosen(turn, rows, lanes) if alone else Choice()
            if not alone or choice.later:
                if not await self._take_along(turn, lanes):
                    return False
                rows = await parked.first(turn.session, lane.handler, sorted(lanes), most)
                choice = await self._chosen(turn, rows, lanes)
            # A lane under suspicion may be waiting for this one, so this one must not wait for that.
            suspected = self._suspected() - lanes.keys()
            await self._single_out(
                turn, choice, [row for row in choice.later if suspected & {*row.kept.lanes}]
            )
        await self._to_held(turn, choice.behind, due=False)
        await self._to_held(turn, choice.alone, due=True)
        if choice.free:
            await self._apply(replace(turn, along=lanes), choice.free)
        if len(choice.later) < choice.seen:
            return True
        # What they wait for may be due and yet have to wait, for one that has failed meanwhile.
        await parked.let_wait(turn.session, lane.handler)
        return False

    async def _single_out(self, turn: Turn, choice: Choice, rows: Sequence[HeldRow]) -> None:
        """Hold a few rows that are to be called one by one, and no more before those are called.

        Each of many would be looked at again and again, until those before it are gone.
        """
        if rows and not await held.any_untried(turn.session, turn.lane):
            few = rows[:FEW]
            await self._to_held(turn, few, due=True)
            choice.later = [row for row in choice.later if row not in few]

    def _suspected(self) -> set[int]:
        return {lane.number for lane in self._suspicions}

    async def _few(self, turn: Turn, notes: Notes, most: int) -> tuple[Turn, int]:
        """Of a lane under suspicion take a few rows; or judge the first of them."""
        rows, suspicion = notes.suspicion.rows, notes.suspicion
        most_in_hand = self._batch if rows.until is None else 1
        first = await parked.first(turn.session, turn.lane.handler, (turn.lane.number,), most_in_hand)
        if rows.until is None and first:
            rows.until = first[-1].id  # all that the dead worker may have had in hand
        if not first or rows.until is None or first[0].id > rows.until:
            if self._suspicions.get(turn.lane) is suspicion:
                del self._suspicions[turn.lane]
            return replace(turn, notes=None), most
        failure = verdict(notes.deaths_of_row(first[0].id), self._applying.policy)
        if failure is None:
            return turn, notes.few_rows(first[0].id)
        turn.spoilers["held", first[0].id] = failure
        return replace(turn, careful=True), 1

    async def _take_along(self, turn: Turn, lanes: dict[int, LaneRow]) -> bool:
        """Lock the other lanes, as far as they are free; from then on the pass may apply what is theirs.

        All of them, because what a row waits for may be parked in any: one that left a key of this lane for
        another lane's is parked in the lower of the two. False where another pass is just doing the same:
        that one wants this lane, too, and with it much more can be applied at once.
        """
        handler = turn.lane.handler
        async with self._gate.taking() as alone:
            if alone:
                wanted = set(range(turn.source.lanes or 1)) - lanes.keys() - self._suspected()
                lanes.update(await positions.lock_others(turn.session, handler, sorted(wanted)))
        return alone

    async def _chosen(self, turn: Turn, rows: Sequence[HeldRow], lanes: Mapping[int, LaneRow]) -> Choice:
        before, wall = Before({}, {}), None
        rows = _named_once(rows)
        if any(row.holding > row.parked for row in lanes.values()):
            before = await parked.before(turn.session, turn.lane.handler, rows)
            wall = await parked.wall(turn.session, turn.lane.handler)
        return choose(rows, lanes.keys(), before, wall)

    async def _to_held(self, turn: Turn, rows: Sequence[HeldRow], *, due: bool) -> None:
        if rows:
            await parked.to_held(turn.session, [row.id for row in rows], due=due)
            self._gone(turn, rows)

    @staticmethod
    def _gone(turn: Turn, rows: Iterable[HeldRow]) -> None:
        for row in rows:
            turn.progress.parked[row.kept.lanes[0]] -= 1

    async def _apply(self, turn: Turn, free: Sequence[HeldRow]) -> None:
        if turn.careful:
            items = await self._readable(turn, free)
        else:
            try:
                items = await self._decoded(turn, free)
            except Exception as error:
                raise self._applying.trouble(error) from error
        outcome = await self._applying.called(turn, self._call(turn), items, _TRAITS)
        await self._applied(turn, [one.row for one in outcome.applied])
        await self._failed(turn, [(one.row, failure) for one, failure in outcome.failed])
        # Those not tried yet stay parked.
        await self._to_held(turn, [one.row for one in outcome.behind], due=False)

    async def _applied(self, turn: Turn, rows: Sequence[HeldRow]) -> None:
        if not rows:
            return
        progress = turn.progress
        await parked.let_go(turn.session, [row.id for row in rows])
        progress.applied += sum(row.kept.changes for row in rows)
        progress.done += [Applied(row.kept.keys, row.kept.position) for row in rows]
        progress.tell("applied", (row.kept.position for row in rows))
        self._gone(turn, rows)
        for row in rows:
            turn.holds(row.kept.lanes, -1)
        await self._promote(turn, rows)

    async def _failed(self, turn: Turn, failed: Sequence[tuple[HeldRow, Failure]]) -> None:
        for row, failure in failed:
            self._applying.tell(turn, failure, row.kept.position)
            turn.progress.tell(fate_of(failure), (row.kept.position,))
        await held.failed_again(turn.session, failed)
        self._gone(turn, [row for row, _ in failed])
        gone = [row for row, failure in failed if not failure.holds_back]
        for row in gone:
            turn.holds(row.kept.lanes, -1)
        if gone:
            await self._promote(turn, gone)

    async def _promote(self, turn: Turn, rows: Sequence[HeldRow]) -> None:
        """Let the next of these keys be due, where one of them may be held behind what has gone."""
        others = any(row.holding > row.parked for row in turn.along.values())
        if others and await held.any_behind(turn.session, turn.lane.handler):
            keys = sorted({key for row in rows for key in row.kept.keys})
            await self._retrying.release(turn, keys)

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
                await self._failed(turn, [(row, failure)])
                if failure.holds_back:
                    blocked.update(row.kept.keys)
        await self._to_held(turn, behind, due=False)
        return items

    def _call(self, turn: Turn) -> Call[_Unparked]:
        keys, changes = self._applying.keys_call(turn), self._applying.changes_call(turn)

        async def call(items: Sequence[_Unparked], named: Named[Failure] | None) -> None:
            if self._derives:
                await keys([one.item for one in items if isinstance(one.item, KeyItem)], named)
            else:
                await changes([one.item for one in items if isinstance(one.item, Item)], named)

        return call


def _named_once(rows: Sequence[HeldRow]) -> Sequence[HeldRow]:
    """End a batch where a position comes again, as they do after a restore: by it changes are told apart."""
    known = set()
    for n, row in enumerate(rows):
        if row.kept.position in known:
            return rows[:n]
        if row.kept.source != "key":
            known.add(row.kept.position)
    return rows
