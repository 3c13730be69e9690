"""Within a pass: calls the handler, for fresh changes and for others that are to be called again.

Everything here runs in the transaction of one pass, under its lane's lock; which entries those are, and the
order of steps around it, is the drain's business (drain.py).
"""

import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import NamedTuple, TypeVar

import structlog

from worker import held
from worker.change import Change, Position
from worker.draining.calls import (
    Caller,
    CallFailedError,
    Calling,
    Isolation,
    LaneBlockedError,
    Outcome,
    Traits,
)
from worker.draining.hints import Odds
from worker.draining.items import Decoder, Item, KeyItem
from worker.draining.passes import Turn
from worker.held import Blocked, HeldRow, Kept
from worker.lanes import Read
from worker.naming import Named
from worker.overtaking import Applied
from worker.registry import Handler
from worker.retries import Failure, blames_nobody, classify

log = structlog.get_logger(__name__)

MOST_AT_ONCE = 1_000
"""Changes, or keys, in one call: a TRUNCATE may concern more than one call can do within its time."""

ItemT = TypeVar("ItemT")
Call = Callable[[Sequence[ItemT], Named[Failure] | None], Awaitable[None]]
"""Calls the handler; it may name those of the items that have failed."""

_OF_KEYS = Traits[KeyItem](lambda item: (item.key,), lambda item: item.key, lambda item: item.value)
_OF_CHANGES = Traits[Item](
    lambda item: item.read.entry.keys, lambda item: item.read.position, lambda item: item.change
)


class _Verdict(NamedTuple):
    """A change that is not applied now."""

    read: Read
    failure: Failure | None
    """None: it waits behind another one."""


class Applying:
    """Applies for one handler."""

    def __init__(self, caller: Caller, decoder: Decoder) -> None:
        self.handler: Handler = caller.handler
        self._caller = caller
        self.decoder = decoder
        self.policy = caller.policy
        self._odds = Odds()
        self._odds_again = Odds()
        """Of what is called again: nearly all of it fails, or nearly nothing."""

    # Fresh changes

    def cut(self, turn: Turn, batch: Sequence[Read]) -> Sequence[Read]:
        """End a batch at the first entry that is known to take the transaction with it."""
        if not turn.spoilers:
            return batch
        for n, read in enumerate(batch):
            identities: Iterable[object] = (
                read.entry.keys if self.handler.kind == "derive" else (read.position,)
            )
            if not turn.spoilers.keys().isdisjoint(identities):
                return batch[: n + 1]
        return batch

    async def fresh(self, turn: Turn, batch: Sequence[Read]) -> None:
        """Apply entries, or hold what cannot be applied.

        Raises:
            CallFailedError, TransactionSpoiltError: roll back, and make the pass again with more care.
            LaneBlockedError: roll back, and wait.
        """
        turn.progress.latest_at = batch[-1].entry.at
        if (traces := self._caller.traces) is not None:
            turn.progress.arrived |= {
                read.position: read.entry.at for read in batch if traces.wants(read.position)
            }
        if turn.careful and turn.notes is None:  # a call has failed; under suspicion none has
            await self.decoder.doubt(turn.session)
        waiting = turn.row.holding + turn.progress.holding[turn.lane.number]
        blocked = Blocked()
        if waiting > 0 or max([len(read.entry.lanes) for read in batch]) > 1:
            keys = sorted({key for read in batch for key in read.entry.keys})
            if keys:
                blocked = await held.held_keys(turn.session, self.handler.name, keys)
            else:
                blocked.everything = await held.any_waits(turn.session, self.handler.name)
        if self.handler.kind == "derive":
            await self._keys(turn, batch, blocked.keys)
        else:
            await self._changes(turn, batch, blocked)

    async def _keys(self, turn: Turn, batch: Sequence[Read], blocked: set[bytes]) -> None:
        """Call a derive handler with each key once, however many changes lie behind it."""
        counts, waiting = count(batch, blocked)
        await held.absorb(turn.session, self.handler.name, waiting)
        verdicts: list[tuple[KeyItem, Failure | None]] = []
        items = self._typed(turn, counts, verdicts)
        outcome = await self.called(turn, self.keys_call(turn), items, _OF_KEYS)
        turn.progress.applied += sum(item.changes for item in outcome.applied)
        verdicts += outcome.failed
        verdicts += [(item, None) for item in outcome.behind + outcome.untried]
        _tell_of(turn, batch, {*waiting, *(item.key for item, _ in verdicts)})
        lanes, at = (turn.lane.number,), batch[-1].position
        await self._hold(
            turn,
            [(Kept(lanes, (item.key,), at, "key", b"", item.changes), failure) for item, failure in verdicts],
            at_once=True,
        )

    def _typed(
        self, turn: Turn, counts: dict[bytes, int], verdicts: list[tuple[KeyItem, Failure | None]]
    ) -> list[KeyItem]:
        """Give keys their types; what cannot be read as such, after the column was altered, is held."""
        items = []
        for key, changes in counts.items():
            try:
                items.append(KeyItem(key, self.decoder.key(key), changes))
            except Exception as error:
                if not turn.careful:
                    raise CallFailedError from error
                verdicts.append((KeyItem(key, None, changes), self.judge(error)))
        return items

    async def _changes(self, turn: Turn, batch: Sequence[Read], blocked: Blocked) -> None:
        """Call a change handler with each change once, in order; later ones of a held key wait."""
        unreadable: dict[Position, Failure] = {}
        readable: dict[Position, Item] = {}
        if turn.careful:
            await self._read_each(turn, batch, readable, unreadable)
        free: list[Read] = []
        verdicts: list[_Verdict] = []
        for read in batch if turn.careful or blocked else ():
            behind = blocked.holds_back(read.entry.keys)
            if not behind and read.position not in unreadable:
                free.append(read)
                continue
            verdicts.append(_Verdict(read, None if behind else unreadable[read.position]))
            blocked.add(read.entry.keys)
        if not turn.careful:
            items = await self._decoded(turn, free if blocked else batch)
        else:
            items = [readable[read.position] for read in free]
        outcome = await self.called(turn, self.changes_call(turn), items, _OF_CHANGES)
        applied = outcome.applied
        verdicts += [_Verdict(item.read, failure) for item, failure in outcome.failed]
        verdicts += [_Verdict(item.read, None) for item in outcome.behind + outcome.untried]
        turn.progress.applied += len(applied)
        turn.progress.tell("applied", (item.read.position for item in applied))
        if turn.may_overtake or outcome.failed:
            turn.progress.done += [Applied(item.read.entry.keys, item.read.position) for item in applied]
        # The order of a key is the order in which its changes are held.
        verdicts.sort(key=lambda one: one.read.position)
        await self._hold(turn, [(_kept(one.read), one.failure) for one in verdicts])

    async def _decoded(self, turn: Turn, reads: Sequence[Read]) -> list[Item]:
        try:
            return await self.decoder.changes(turn.session, reads)
        except Exception as error:
            raise self.trouble(error) from error

    async def _read_each(
        self,
        turn: Turn,
        batch: Sequence[Read],
        readable: dict[Position, Item],
        unreadable: dict[Position, Failure],
    ) -> None:
        """Decode, and find what cannot be: malformed, or of a table no longer subscribed to."""
        try:
            async with turn.session.begin_nested():
                items = await self.decoder.changes(turn.session, batch)
        except Exception as error:
            if len(batch) > 1:
                middle = len(batch) // 2
                await self._read_each(turn, batch[:middle], readable, unreadable)
                await self._read_each(turn, batch[middle:], readable, unreadable)
                return
            failure = self.judge(error)
            if failure is None:
                raise LaneBlockedError from error
            unreadable[batch[0].position] = failure
        else:
            readable.update({item.read.position: item for item in items})

    async def _hold(
        self, turn: Turn, changes: Sequence[tuple[Kept, Failure | None]], *, at_once: bool = False
    ) -> None:
        await held.hold(turn.session, self.handler.name, changes, at_once=at_once)
        for kept, failure in changes:
            if failure is not None:
                self.tell(turn, failure, kept.position)
            if self.handler.kind == "change":
                turn.progress.tell(fate_of(failure), (kept.position,))
            if failure is None or failure.holds_back:
                turn.holds(kept.lanes, 1)

    # Calls

    def keys_call(self, turn: Turn) -> Call[KeyItem]:
        """Make what calls a derive handler."""

        async def call(items: Sequence[KeyItem], named: Named[Failure] | None) -> None:
            await self._caller.keys(
                turn.session, [item.value for item in items], tuple(turn.progress.arrived), named
            )

        return call

    def changes_call(self, turn: Turn) -> Call[Item]:
        """Make what calls a change handler."""

        async def call(items: Sequence[Item], named: Named[Failure] | None) -> None:
            # Positions alone repeat after a restore; and what had failed before it is still the same change.
            histories = {item.change.position: item.history for item in items if item.history is not None}

            def name(change: Change) -> str:
                history = histories.get(change.position) or turn.source.history
                return f"{history}:{self.handler.name}:{change.position}"

            await self._caller.changes(turn.session, [item.change for item in items], name, named)

        return call

    async def called(
        self, turn: Turn, call: Call[ItemT], items: Sequence[ItemT], traits: Traits[ItemT]
    ) -> Outcome[ItemT]:
        """Call with items: all at once, or with the care that the pass takes.

        Raises:
            CallFailedError, TransactionSpoiltError, LaneBlockedError: as `fresh`.
        """
        if turn.careful:
            return await self._apart(turn, call, items, traits)
        began = time.perf_counter()
        outcome = await self._whole(turn, call, items, traits)
        turn.progress.called_seconds += time.perf_counter() - began
        turn.progress.called += len(items)
        return outcome

    async def _whole(
        self, turn: Turn, call: Call[ItemT], items: Sequence[ItemT], traits: Traits[ItemT]
    ) -> Outcome[ItemT]:
        """Call with the whole batch, without savepoints: nearly always all is well."""
        size, outcome = self.handler.batch or MOST_AT_ONCE, Outcome[ItemT]()
        for start in range(0, len(items), size):
            given = items[start : start + size]
            if outcome.blocked:
                given = [item for item in given if not outcome.holds_back(item, traits.keys(item))]
            if not given:
                continue
            named = self._naming(given, traits)
            try:
                await call(given, named)
            except Exception as error:
                raise self.trouble(error) from error
            if named is None or not named.failed:
                outcome.applied += given
                continue
            if turn.shared or named.overrun(len(given)):
                raise CallFailedError
            failed = {traits.identity(given[place]): failure for place, failure in named.failed.items()}
            outcome.settle(given, traits.keys, lambda item: failed.get(traits.identity(item)))  # noqa: B023 - called at once
        return outcome

    def _naming(self, items: Sequence[ItemT], traits: Traits[ItemT]) -> Named[Failure] | None:
        """Let the handler name those items that fail; None where it cannot."""
        if not (self.handler.wants_list and self.handler.wants_context):
            return None
        return Named(
            lambda place, error: self.judge(error, traits.attempt(items[place])),
            lambda place: traits.keys(items[place]),
            by_identity=self.handler.kind == "change",
        )

    def judge(self, error: BaseException, attempt: int = 1) -> Failure | None:
        """Judge a failure; None where nobody is to blame."""
        return classify(error, attempt, self._caller.policy)

    def trouble(self, error: Exception) -> CallFailedError | LaneBlockedError:
        """Say how a pass goes on after a failure of a whole batch."""
        return LaneBlockedError() if blames_nobody(error) else CallFailedError()

    async def _apart(
        self,
        turn: Turn,
        call: Call[ItemT],
        items: Sequence[ItemT],
        traits: Traits[ItemT],
        odds: Odds | None = None,
    ) -> Outcome[ItemT]:
        """Call with savepoints, so that only the guilty wait."""
        odds = odds or self._odds
        isolation: Isolation[ItemT] = Isolation(
            turn.session,
            calling=Calling(
                call,
                naming=lambda some: self._naming(some, traits),
                judge=lambda item, error: self.judge(error, traits.attempt(item)),
            ),
            traits=traits,
            spoilers=turn.spoilers,
            together=turn.together,
            singly=not self.handler.wants_list,
            odds=odds,
        )
        size = self.handler.batch or MOST_AT_ONCE
        for start in range(0, len(items), size):
            found = len(isolation.outcome.failed) - isolation.named
            await isolation.apply(batch := items[start : start + size])
            # Who is named costs no call.
            odds.count(len(batch), len(isolation.outcome.failed) - isolation.named - found)
        return isolation.outcome

    def tell(self, turn: Turn, failure: Failure, position: Position) -> None:
        """Count a failure and log it; neither values nor the error's text, which may have some."""
        turn.progress.failures[failure.error_class] += 1
        if failure.delay is not None:
            turn.progress.due_in = min(failure.delay, turn.progress.due_in)
        delay = None if failure.delay is None else round(failure.delay, 1)
        log.warning(
            "handler failed",
            handler=turn.lane.handler,
            lane=turn.lane.number,
            position=str(position),
            error_class=failure.error_class,
            retry_in_seconds=delay,
            **self._in_trace(position),
        )

    def _in_trace(self, position: Position) -> dict[str, str]:
        traces = self._caller.traces
        found = None if traces is None else traces.trace_id(position)
        return {} if found is None else {"trace_id": found}

    async def again(
        self, turn: Turn, rows: Sequence[HeldRow], further: Callable[[], None]
    ) -> list[tuple[HeldRow, Failure | None]]:
        """Call once more for held changes; returns each with why it failed.

        Args:
            turn: of the pass.
            rows: no two of which have a key or a position in common; several for a handler of lists.
            further: told of each call after the first.
        """
        turn.progress.retries += len(rows)
        given: dict[int, object] = {}
        calls = 0

        async def call(some: Sequence[HeldRow], named: Named[Failure] | None) -> None:
            nonlocal calls
            calls += 1
            if calls > 1:
                further()
            if some[0].kept.source == "key":
                keys = [
                    KeyItem(row.kept.keys[0], self.decoder.key(row.kept.keys[0]), row.kept.changes)
                    for row in some
                ]
                given.update({row.id: item.value for row, item in zip(some, keys, strict=True)})
                await self.keys_call(turn)(keys, named)
            else:
                items = await self.decoder.parked(turn.session, some)
                given.update({row.id: item.change for row, item in zip(some, items, strict=True)})
                await self.changes_call(turn)(items, named)

        traits = Traits[HeldRow](
            lambda _: (),
            lambda row: ("held", row.id),
            lambda row: given.get(row.id, row),
            lambda row: row.attempts + 1,
        )
        outcome = await self._apart(turn, call, rows, traits, self._odds_again)
        failed = {row.id: failure for row, failure in outcome.failed}
        return [(row, failed.get(row.id)) for row in rows]


def _kept(read: Read) -> Kept:
    entry = read.entry
    return Kept(entry.lanes, entry.keys, read.position, entry.source, entry.payload)


def fate_of(failure: Failure | None) -> str:
    """Name what becomes of a change that failed, or waits behind one."""
    return "held" if failure is None or failure.delay is not None else "dead"


def _tell_of(turn: Turn, batch: Sequence[Read], kept: Collection[bytes]) -> None:
    """Say of entries of a derive handler what became of them: held are those with a key that is kept."""
    if turn.progress.fates is not None:
        for position, entry in batch:
            turn.progress.tell("held" if any(key in kept for key in entry.keys) else "applied", (position,))


def count(batch: Sequence[Read], blocked: set[bytes]) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """Count the changes behind each key that is free, and behind each that is held.

    A change of several keys counts once: with a held one if there is one, else with its first.
    """
    free: dict[bytes, int] = {}
    waiting: dict[bytes, int] = {}
    for _, entry in batch:
        held_key = next((key for key in entry.keys if key in blocked), None)
        if held_key is not None:
            waiting[held_key] = waiting.get(held_key, 0) + entry.changes
        counted = held_key is not None
        for key in entry.keys:
            if key not in blocked:
                free[key] = free.get(key, 0) + (0 if counted else entry.changes)
                counted = True
    return free, waiting
