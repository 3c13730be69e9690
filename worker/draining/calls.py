"""Calling a handler: with what, for how long, in whose session, and what a failure spoils.

A call is first tried for the whole batch at once. Where that fails the batch is applied again with
savepoints, so that only the guilty wait and the innocent are applied in the same transaction.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker.change import ROWS_OF_CALL, Change, Context, Position
from worker.database import sqlstate_of
from worker.draining.guard import Watch, guarded
from worker.draining.hints import Odds, suspect
from worker.errors import HandlerStuck, RedisLost
from worker.forgetting import Table
from worker.naming import Named
from worker.pulse import beat
from worker.registry import Handler
from worker.retries import Failure, Policy, blames_nobody
from worker.rows.lazy import RowsOfCall
from worker.sessions import acting_as, handler_session

if TYPE_CHECKING:
    from worker.tracing.spans import Traces

Item = TypeVar("Item")

SEGMENT = 32
"""Changes in one savepoint: when one of them fails, those before it are called again.

Where one in a hundred fails, this many cost least; where fewer do, more would save next to nothing.
"""
_IN_FAILED_TRANSACTION = "25P02"
_CHECK = text("select tailrace.check_constraints()")


class CallFailedError(Exception):
    """The handler failed for a batch; its transaction is to be rolled back and the batch taken apart."""


class LaneBlockedError(Exception):
    """Nobody is to blame (the database was away, another transaction in the way): the lane waits."""


class TransactionSpoiltError(Exception):
    """A call took the transaction with it: its connection had to be closed.

    Attributes:
        spoiler: identity of the culprit, None where the call had several items.
        failure: what it did.
    """

    def __init__(self, spoiler: object, failure: Failure) -> None:
        super().__init__(failure.error_class)
        self.spoiler = spoiler
        self.failure = failure


class Caller:
    """Calls one handler."""

    def __init__(
        self,
        handler: Handler,
        *,
        timeout: float,
        policy: Policy,
        context: Callable[[str | None], Context],
        cached: Collection[Table] = (),
        traces: "Traces | None" = None,
    ) -> None:
        self.handler = handler
        self.policy = policy
        self.traces = traces
        self.timeout = timeout
        self._context = context
        followed = {(one.schema, one.table) for one in handler.subscriptions}
        self._cached = followed.intersection(cached) if handler.wants_context else frozenset[Table]()
        self._by_key = all(one.lane_key is None for one in handler.subscriptions)

    async def keys(
        self,
        session: AsyncSession,
        keys: Sequence[Any],
        positions: Sequence[Position] = (),
        named: Named[Any] | None = None,
    ) -> None:
        """Call a derive handler with the keys whose rows changed.

        Args:
            session: in whose transaction.
            keys: typed.
            positions: those of the changes.
            named: gets what the handler says of single keys; without it, that is a failure of all.
        """
        await self._guarded(session, [(list(keys), None)], positions, named)

    async def changes(
        self,
        session: AsyncSession,
        changes: Sequence[Change],
        name: Callable[[Change], str],
        named: Named[Any] | None = None,
    ) -> None:
        """Call a change handler: with the list where it wants one, else once for each change."""
        if self.handler.wants_list:
            await self._guarded(session, [(list(changes), None)], named=named)
        else:
            await self._guarded(session, [(change, name(change)) for change in changes])

    async def _guarded(
        self,
        session: AsyncSession,
        calls: Sequence[tuple[object, str | None]],
        positions: Sequence[Position] = (),
        named: Named[Any] | None = None,
    ) -> None:
        call = self._call if self.traces is None else partial(self._traced, self.traces, positions)

        async def work(watch: Watch) -> None:
            for argument, idempotency_key in calls:
                await watch.call(call(session, argument, idempotency_key, named))

        try:
            await guarded(self.timeout, work, self.handler.name)
        except HandlerStuck:
            await session.invalidate()
            raise

    async def _traced(
        self,
        traces: "Traces",
        positions: Sequence[Position],
        session: AsyncSession,
        argument: object,
        idempotency_key: str | None,
        named: Named[Any] | None,
    ) -> None:
        if self.handler.kind == "change":
            changes = [argument] if isinstance(argument, Change) else argument
            positions = [change.position for change in cast("list[Change]", changes)]
        items = len(argument) if isinstance(argument, list) else 1
        with traces.handling(self.handler.name, positions, items):
            await self._call(session, argument, idempotency_key, named)

    async def _call(
        self,
        session: AsyncSession,
        argument: object,
        idempotency_key: str | None,
        named: Named[Any] | None,
    ) -> None:
        arguments: list[object] = []
        changes = (
            [argument] if isinstance(argument, Change) else argument if isinstance(argument, list) else []
        )
        if self.handler.wants_context:
            # Of one change that is called alone, and where nobody judges: as if it had been raised.
            named = named or Named(by_identity=self.handler.kind == "change")
            named.begin(argument if isinstance(argument, list) else (argument,))
            context = replace(self._context(idempotency_key), named=named)
            arguments.append(context)
            if self._cached:
                await self._forget(context, changes)
        rows = RowsOfCall(session, changes)
        known = ROWS_OF_CALL.set(rows)
        try:
            async with acting_as(session, self.handler):
                await self.handler.function(argument, handler_session(session), *arguments)
                if named is not None:
                    named.end()
                # What the handler left in the unit of work is part of its call, and may fail like it.
                if session.new or session.dirty or session.deleted:
                    await session.flush()
        except (RedisConnectionError, RedisTimeoutError) as error:
            raise RedisLost(f"Redis cannot be reached ({type(error).__name__})") from error
        finally:
            rows.end()
            ROWS_OF_CALL.reset(known)
            beat()

    async def _forget(self, context: Context, given: Sequence[Any]) -> None:
        """Forget what the cache has of rows behind this call, before it is asked.

        The handler that follows the table does so, too, but perhaps later: and what is derived from an older
        row than the one it is called for would stay so.
        """
        if self.handler.kind == "change":
            rows: dict[Table, list[Any]] = {}
            for change in given:
                table = (change.schema, change.table)
                if table in self._cached:
                    rows.setdefault(table, []).append(change.key)
            for table, keys in rows.items():
                await context.cache.rows_changed(table, keys)
            return
        for table in self._cached:
            if self._by_key:
                await context.cache.rows_changed(table, given)
            else:
                await context.cache.table_changed(table)


class _OverrunError(Exception):
    """A handler has named what failed, and may have written for what waits behind it."""


class Outcome(Generic[Item]):
    """What became of the items of some calls."""

    def __init__(self) -> None:
        self.applied: list[Item] = []
        self.failed: list[tuple[Item, Failure]] = []
        self.behind: list[Item] = []
        """Not tried: an item before it with one of its keys failed."""
        self.untried: list[Item] = []
        """Not tried: they came after one that takes the transaction with it, and will be called alone."""
        self.blocked: set[bytes] = set()

    def holds_back(self, item: Item, keys: Iterable[bytes]) -> bool:
        """Put an item behind a failed one of its keys."""
        if not self.blocked or self.blocked.isdisjoint(own := set(keys)):
            return False
        self.blocked |= own
        self.behind.append(item)
        return True

    def fail(self, item: Item, keys: Iterable[bytes], failure: Failure) -> None:
        """Note a failure, and what it holds back from now on."""
        self.failed.append((item, failure))
        if failure.holds_back:
            self.blocked |= set(keys)

    def settle(
        self,
        items: Sequence[Item],
        keys: Callable[[Item], Iterable[bytes]],
        failure: Callable[[Item], Failure | None],
    ) -> None:
        """Note what became of items, in their order, after a call that has not been undone."""
        for item in items:
            if self.holds_back(item, keys(item)):
                continue
            if (known := failure(item)) is None:
                self.applied.append(item)
            else:
                self.fail(item, keys(item), known)


@dataclass(frozen=True)
class Traits(Generic[Item]):
    """What must be known of items that are called together."""

    keys: Callable[[Item], Iterable[bytes]]
    """Its lane keys."""
    identity: Callable[[Item], object]
    """Which tells it from all others."""
    argument: Callable[[Item], object]
    """What the handler is given of it."""
    attempt: Callable[[Item], int] = lambda _: 1
    """Which attempt at it is being made."""


@dataclass(frozen=True)
class Calling(Generic[Item]):
    """How items are called, and what follows from a failure."""

    call: Callable[[Sequence[Item], Named[Failure] | None], Awaitable[None]]
    naming: Callable[[Sequence[Item]], Named[Failure] | None]
    """Gets what the handler says of single items; None where it can say nothing."""
    judge: Callable[[Item, BaseException], Failure | None]


class Isolation(Generic[Item]):
    """Applies a batch with savepoints, so that only the guilty fail.

    Where the items are called one by one, the guilty is known: those before it are applied again without it.
    Where they are called together, the handler may name them; or the error may tell whom it is about: that
    one is called alone, and the others without it. Else what fails is halved until the guilty stands alone.
    """

    def __init__(
        self,
        session: AsyncSession,
        *,
        calling: Calling[Item],
        traits: Traits[Item],
        spoilers: Mapping[object, Failure],
        together: bool,
        singly: bool,
        odds: Odds,
    ) -> None:
        self._session = session
        self._call = calling.call
        self._naming = calling.naming
        self._judge = calling.judge
        self._keys = traits.keys
        self._identity = traits.identity
        self._spoilers = spoilers
        self._odds = odds
        self._together = together
        self._singly = singly
        self._argument = traits.argument
        self._suspects: set[object] = set()
        """Called alone."""
        self._guilty: dict[object, Failure] = {}
        self._reached: int | None = None
        """Which item of the segment is being called; None where nobody knows."""
        self._ended = False
        self.named = 0
        """How many the handler has named."""
        self.outcome: Outcome[Item] = Outcome()

    async def apply(self, items: Sequence[Item]) -> None:
        """Apply the items in order.

        Raises:
            LaneBlockedError: the database is away.
            TransactionSpoiltError: apply them again in a new transaction, with this spoiler known.
        """
        rest = list(items)
        holds_back, keys = self.outcome.holds_back, self._keys
        while rest := [item for item in rest if not holds_back(item, keys(item))]:
            if self._ended:
                self.outcome.untried += rest
                return
            if (known := self._known(rest[0])) is not None:
                # What comes after a spoiler may do the same, and all done so far would be undone once more.
                self._ended = self._identity(rest[0]) in self._spoilers
                self.outcome.fail(rest[0], keys(rest.pop(0)), known)
                continue
            segment = self._segment(rest)
            rest = [*await self._try(segment), *rest[len(segment) :]]

    def _known(self, item: Item) -> Failure | None:
        identity = self._identity(item)
        return self._spoilers.get(identity) or self._guilty.get(identity)

    def _segment(self, items: Sequence[Item]) -> Sequence[Item]:
        if self._identity(items[0]) in self._suspects:
            return items[:1]
        most = (SEGMENT if self._singly else self._odds.segment(len(items))) if self._together else 1
        for n, item in enumerate(items[:most]):
            identity = self._identity(item)
            if identity in self._spoilers or (identity in self._suspects and identity not in self._guilty):
                return items[:n]
        return items[:most]

    async def _try(self, segment: Sequence[Item]) -> Sequence[Item]:
        """Apply items in one savepoint; return those that are to be tried again."""
        items, left_out = self._without_guilty(segment)
        named = self._naming(items)
        self._reached = None
        try:
            await self._in_savepoint(items, named)
        except _OverrunError:
            return self._named(items, named, segment)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is judged
            return [*await self._after_failure(items, error), *left_out]
        self._named(items, named, segment)
        self.outcome.settle(segment, self._keys, self._known)
        if self._identity(items[0]) in self._suspects:
            self._odds.suspected(rightly=self._known(items[0]) is not None)
        return ()

    def _named(
        self, items: Sequence[Item], named: Named[Failure] | None, segment: Sequence[Item]
    ) -> Sequence[Item]:
        """Note whom the handler has named."""
        if named is not None and named.failed:
            self.named += len(named.failed)
            self._guilty |= {self._identity(items[place]): one for place, one in named.failed.items()}
        return segment

    def _without_guilty(self, segment: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
        """Leave out the guilty, and what comes after them of their keys."""
        if not self._guilty:
            return segment, ()
        calls: list[Item] = []
        left_out: list[Item] = []
        held: set[bytes] = set()
        for item in segment:
            keys = set(self._keys(item))
            failure = self._known(item)
            if failure is None and held.isdisjoint(keys):
                calls.append(item)
                continue
            left_out.append(item)
            if failure is None or failure.holds_back:
                held |= keys
        return calls, left_out

    async def _in_savepoint(self, items: Sequence[Item], named: Named[Failure] | None) -> None:
        async with self._session.begin_nested():
            if self._singly:
                for n, item in enumerate(items):
                    self._reached = n
                    await self._call([item], None)
                self._reached = None
            else:
                await self._call(items, named)
                if named is not None and named.overrun(len(items)):
                    raise _OverrunError
            connection = await self._session.connection()
            # A deferred constraint would fail at COMMIT, when nobody knows whose fault it is.
            await connection.execute(_CHECK)

    async def _after_failure(self, items: Sequence[Item], error: Exception) -> Sequence[Item]:
        # An earlier call may have swallowed the error that made the transaction useless for this one.
        swallowed = sqlstate_of(error) == _IN_FAILED_TRANSACTION
        reached = None if swallowed else self._reached
        reached = 0 if len(items) == 1 else reached
        if blames_nobody(error):
            raise LaneBlockedError from error
        guilty = None if reached is None else items[reached]
        if guilty is None and await self._usable():
            index = None if swallowed else self._suspect(items, error)
            return await self._halve(items) if index is None else self._set_aside(items, index)
        # A traceback costs more than a call: it is made where it is kept.
        failure = self._judge(items[reached or 0], error)
        if failure is None:
            raise LaneBlockedError from error
        if not await self._usable():
            spoiler = None if guilty is None else self._identity(guilty)
            raise TransactionSpoiltError(spoiler, failure) from error
        self._guilty[identity := self._identity(items[reached or 0])] = failure
        if identity in self._suspects:
            self._odds.suspected(rightly=True)
        return items

    def _suspect(self, items: Sequence[Item], error: Exception) -> int | None:
        if self._singly or not self._odds.tells:
            return None
        index = suspect(error, [self._argument(item) for item in items])
        return None if index is None or self._identity(items[index]) in self._suspects else index

    def _set_aside(self, items: Sequence[Item], index: int) -> Sequence[Item]:
        """Put the one that an error is about behind the others, with what comes after it of its keys."""
        self._suspects.add(self._identity(items[index]))
        others, aside = list(items[:index]), [items[index]]
        keys = set(self._keys(items[index]))
        for item in items[index + 1 :]:
            if keys.isdisjoint(own := set(self._keys(item))):
                others.append(item)
            else:
                keys |= own
                aside.append(item)
        return others + aside

    async def _halve(self, items: Sequence[Item]) -> Sequence[Item]:
        """Apply items that have failed together up to where one is found guilty; return what comes after."""
        known = len(self._guilty)
        while len(items) > 1 and len(self._guilty) == known:
            # Where the first half was innocent the other one is not: it need not be tried as a whole again.
            middle = len(items) // 2
            await self.apply(items[:middle])
            items = items[middle:]
        return items

    async def _usable(self) -> bool:
        if not self._session.in_transaction() or not self._session.is_active:
            return False
        return not (await self._session.connection()).invalidated
