"""Calling a handler: with what, for how long, in whose session, and what a failure spoils.

A call is first tried for the whole batch at once. Where that fails the batch is applied again with
savepoints, so that only the guilty wait and the innocent are applied in the same transaction.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker.change import Change, Context
from worker.registry import Handler
from worker.retries import Failure, Policy
from worker.sessions import acting_as, handler_session

Item = TypeVar("Item")

_AT_ONCE = text("set constraints all immediate")
_AT_COMMIT = text("set constraints all deferred")


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
    ) -> None:
        self.handler = handler
        self.policy = policy
        self._timeout = timeout
        self._context = context

    async def keys(self, session: AsyncSession, keys: Sequence[Any]) -> None:
        """Call a derive handler with the keys whose rows changed."""
        await self._call(session, list(keys), None)

    async def changes(
        self, session: AsyncSession, changes: Sequence[Change], name: Callable[[Change], str]
    ) -> None:
        """Call a change handler: with the list where it wants one, else once for each change."""
        if self.handler.wants_list:
            await self._call(session, list(changes), None)
            return
        for change in changes:
            await self._call(session, change, name(change))

    async def _call(self, session: AsyncSession, argument: object, idempotency_key: str | None) -> None:
        arguments: list[object] = []
        if self.handler.wants_context:
            arguments.append(self._context(idempotency_key))
        async with asyncio.timeout(self._timeout), acting_as(session, self.handler):
            await self.handler.function(argument, handler_session(session), *arguments)
            # What the handler left in the unit of work is part of its call, and may fail like it.
            await session.flush()


class Outcome(Generic[Item]):
    """What became of a batch that was taken apart."""

    def __init__(self) -> None:
        self.applied: list[Item] = []
        self.failed: list[tuple[Item, Failure]] = []
        self.behind: list[Item] = []
        """Not tried: an item before it with one of its keys failed."""
        self.untried: list[Item] = []
        """Not tried: they came after one that takes the transaction with it, and will be called alone."""
        self.blocked: set[bytes] = set()


class Isolation(Generic[Item]):
    """Applies a batch with savepoints, halving what fails, until the guilty stand alone."""

    def __init__(
        self,
        session: AsyncSession,
        *,
        call: Callable[[Sequence[Item]], Awaitable[None]],
        keys: Callable[[Item], Iterable[bytes]],
        judge: Callable[[Item, BaseException], Failure | None],
        identity: Callable[[Item], object],
        spoilers: Mapping[object, Failure],
        together: bool,
    ) -> None:
        self._session = session
        self._call = call
        self._keys = keys
        self._judge = judge
        self._identity = identity
        self._spoilers = spoilers
        self._together = together
        self._ended = False
        self.outcome: Outcome[Item] = Outcome()

    async def apply(self, items: Sequence[Item]) -> None:
        """Apply the items in order.

        Raises:
            LaneBlockedError: the database is away.
            TransactionSpoiltError: apply them again in a new transaction, with this spoiler known.
        """
        free = [item for item in items if not self._holds_back(item)]
        if not free:
            return
        if len(free) > 1 and not self._together:
            for item in free:
                await self.apply([item])
            return
        if len(free) == 1 and (known := self._spoilers.get(self._identity(free[0]))) is not None:
            # Whatever comes after may do the same, and all done so far would be undone once more.
            self._ended = True
            self._fail(free[0], known)
            return
        if self._ended:
            self.outcome.untried += free
            return
        try:
            await self._in_savepoint(free)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is judged
            await self._after_failure(free, error)
        else:
            self.outcome.applied += free

    def _holds_back(self, item: Item) -> bool:
        """Put an item behind a failed one of its keys."""
        if self.outcome.blocked.isdisjoint(keys := set(self._keys(item))):
            return False
        self.outcome.blocked |= keys
        self.outcome.behind.append(item)
        return True

    async def _in_savepoint(self, items: Sequence[Item]) -> None:
        async with self._session.begin_nested():
            await self._call(items)
            connection = await self._session.connection()
            # A deferred constraint would fail at COMMIT, when nobody knows whose fault it is.
            await connection.execute(_AT_ONCE)
            await connection.execute(_AT_COMMIT)

    async def _after_failure(self, items: Sequence[Item], error: Exception) -> None:
        failure = self._judge(items[0], error)
        if failure is None:
            raise LaneBlockedError from error
        if not await self._usable():
            spoiler = self._identity(items[0]) if len(items) == 1 else None
            raise TransactionSpoiltError(spoiler, failure) from error
        if len(items) == 1:
            self._fail(items[0], failure)
            return
        middle = len(items) // 2
        await self.apply(items[:middle])
        await self.apply(items[middle:])

    async def _usable(self) -> bool:
        if not self._session.in_transaction() or not self._session.is_active:
            return False
        return not (await self._session.connection()).invalidated

    def _fail(self, item: Item, failure: Failure) -> None:
        self.outcome.failed.append((item, failure))
        if failure.holds_back:
            self.outcome.blocked |= set(self._keys(item))
