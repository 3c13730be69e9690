"""The feed: polls a temporary logical slot and delivers each change to those who may have it.

It keeps what the real server promises, and no more: a temporary slot goes with its connection, and
the changes committed until the next one is there are gone.
"""

import asyncio
import contextlib
import secrets
import traceback
from collections.abc import Awaitable, Callable, Hashable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import structlog

from standin.changes import sql
from standin.changes.bindings import BadSubscription, Binding
from standin.changes.catalog import published
from standin.changes.distribution import Delivery, Distribution
from standin.changes.pgoutput import Decoder, RowChange
from standin.changes.subscribing import Subscription, check

__all__ = ["ChangeFeed", "Delivery"]

log = structlog.get_logger(__name__)

_Result = TypeVar("_Result")

# asyncpg may be in the midst of its protocol when the connection goes: an internal error then.
_CONNECTION_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
_CHANGES_PER_POLL = 10_000
_CHANGES_PER_DELIVERY = 500
# From so many messages on, a poll is followed by the next without a pause.
_BUSY_MESSAGES = 300
# Decoding starts at the last recorded snapshot each time, so one is asked for now and then:
# without it each poll would read the log of up to 15 s again.
_MESSAGES_PER_SNAPSHOT = 5_000
_CONNECTIONS_TRIED = 3
_BACKOFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)

_SESSION = {
    "application_name": "standin",
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    "search_path": "public, extensions",
    "default_transaction_isolation": "read committed",
}


class ChangeFeed:
    """The changes of the tables of a publication, for any number of subscribers.

    Args:
        dsn: URL of the database, of a user that may replicate and act as the roles of subscribers.
        publication: name of the publication.
        poll_interval: seconds between polls when little is happening.
        max_record_bytes: size of a row in the log from which on its values are left out (413).
        deliver: called with the deliveries of up to 500 changes, in commit order; not called again
            before it returns.
        publication_check_interval: seconds between looks at the tables of the publication.
        on_resubscribed: called for each subscriber whose subscription was made anew because the
            publication's tables changed.
        on_resubscribe_failed: called instead, with the reason, if it was refused this time.
    """

    def __init__(
        self,
        dsn: str,
        *,
        publication: str = "supabase_realtime",
        poll_interval: float = 0.02,
        max_record_bytes: int = 1_048_576,
        deliver: Callable[[Sequence[Delivery]], Awaitable[None]],
        publication_check_interval: float = 60.0,
        on_resubscribed: Callable[[Hashable], Awaitable[None]] | None = None,
        on_resubscribe_failed: Callable[[Hashable, BadSubscription], Awaitable[None]] | None = None,
    ) -> None:
        self._dsn = dsn
        self._publication = publication
        self._poll_interval = poll_interval
        self._deliver = deliver
        self._check_interval = publication_check_interval
        self.on_resubscribed = on_resubscribed
        self.on_resubscribe_failed = on_resubscribe_failed
        self._distribution = Distribution(max_record_bytes)
        self._claims: dict[Hashable, Mapping[str, Any]] = {}
        self._live = asyncio.Event()
        self._subscribing = asyncio.Lock()
        self._checking: asyncpg.Connection | None = None
        self._published: frozenset[int] | None = None
        self._last_check = 0.0
        self._messages = 0
        self.gaps = 0
        """How often a slot was lost, and the changes until the next one with it."""

    async def run(self) -> None:
        """Poll until cancelled. Trouble with the database is waited out, with a gap."""
        failures = 0
        while True:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    slot = await self._connection(stack)
                    self._checking = await self._connection(stack)
                    name = await self._create_slot(slot)
                    # Known before anybody subscribes, or a table added meanwhile would pass unnoticed.
                    await self._check_publication(self._checking)
                    self._live.set()
                    failures = 0
                    await self._poll(stack, slot, name)
            except Exception as error:  # noqa: BLE001 - this loop only survives
                delay = _BACKOFF_SECONDS[min(failures, len(_BACKOFF_SECONDS) - 1)]
                self.gaps += self._live.is_set()
                log.warning("change feed interrupted", reason=_brief(error), retry_in_seconds=delay)
                failures += 1
                self._live.clear()
                await asyncio.sleep(delay)
            finally:
                self._live.clear()

    async def _connection(self, stack: contextlib.AsyncExitStack) -> asyncpg.Connection:
        connection = await asyncpg.connect(self._dsn, server_settings=_SESSION, timeout=10)
        stack.push_async_callback(_close, connection)
        return connection

    async def _create_slot(self, slot: asyncpg.Connection) -> str:
        name = f"supabase_realtime_replication_slot_{secrets.token_hex(6)}"  # as the real one's
        await slot.execute("select pg_create_logical_replication_slot($1, 'pgoutput', true)", name)
        return name

    async def _poll(self, stack: contextlib.AsyncExitStack, slot: asyncpg.Connection, name: str) -> None:
        work = _Work(lambda: self._connection(stack))
        position = await slot.prepare("select pg_current_wal_flush_lsn()::text")
        changes = await slot.prepare(
            "select data from pg_logical_slot_get_binary_changes($1, null, $2, "
            "'proto_version', '1', 'publication_names', $3)"
        )
        names = sql.identifier(self._publication)
        seen: str | None = None
        while True:
            await work.do(self._check_publication)
            now = await position.fetchval()
            count = 0
            if now != seen:
                rows = await changes.fetch(name, _CHANGES_PER_POLL, names)
                count = len(rows)
                # A full answer may have left something behind.
                seen = now if count < _CHANGES_PER_POLL else None
                if count:
                    if not self._distribution.idle:
                        await self._distribute(work, Decoder().changes(row[0] for row in rows))
                    await self._refresh_snapshot(work, count)
            if count < _BUSY_MESSAGES:
                await asyncio.sleep(self._poll_interval)

    async def _distribute(self, work: "_Work", changes: Iterator[RowChange]) -> None:
        while chunk := list(islice(changes, _CHANGES_PER_DELIVERY)):
            deliveries = await self._deliveries(work, chunk)
            if deliveries:
                await self._deliver(deliveries)
            else:
                # Decoding alone must not hold up everything else on the loop.
                await asyncio.sleep(0)

    async def _deliveries(self, work: "_Work", chunk: Sequence[RowChange]) -> list[Delivery]:
        """Return the deliveries of a chunk, without the changes that cannot be distributed at all."""
        try:
            return await work.do(lambda connection: self._distribution.deliveries(connection, chunk))
        except Exception as error:
            if not await work.alive():
                raise
            if len(chunk) == 1:
                log.warning("change withheld", table=chunk[0].relation.name, reason=_place(error))
                return []
        deliveries: list[Delivery] = []
        for change in chunk:
            deliveries += await self._deliveries(work, [change])
        return deliveries

    async def _refresh_snapshot(self, work: "_Work", count: int) -> None:
        self._messages += count
        if self._messages >= _MESSAGES_PER_SNAPSHOT:
            self._messages = 0
            # Only a matter of speed, so it may fail: not granted, or older than PostgreSQL 16.
            with contextlib.suppress(asyncpg.InsufficientPrivilegeError, asyncpg.UndefinedFunctionError):
                await work.do(lambda connection: connection.execute("select pg_log_standby_snapshot()"))

    async def subscribe(
        self, subscriber: Hashable, bindings: Sequence[Binding], claims: Mapping[str, Any]
    ) -> None:
        """Make a subscription, in the place of the subscriber's former one; return when it is live.

        Every change committed from now on is delivered. While the database is away, this waits.

        Raises:
            BadSubscription: if the bindings are refused; a former subscription is gone then too.
        """
        self._distribution.remove(subscriber)
        self._claims.pop(subscriber, None)
        while True:
            await self._live.wait()
            try:
                subscription = await self._checked(subscriber, bindings, claims)
            except _CONNECTION_ERRORS as error:
                log.warning("subscription waits for the database", reason=_brief(error))
                await asyncio.sleep(_BACKOFF_SECONDS[-1])
                continue
            if self._live.is_set():
                break
        self._claims[subscriber] = claims
        self._distribution.add(subscription)

    async def _checked(
        self, subscriber: Hashable, bindings: Sequence[Binding], claims: Mapping[str, Any]
    ) -> Subscription:
        async with self._subscribing, contextlib.AsyncExitStack() as stack:
            connection = self._checking
            if connection is None or connection.is_closed():
                # The one kept for this may go while the slot stays.
                connection = await self._connection(stack)
            return await check(connection, self._publication, subscriber, bindings, claims)

    async def unsubscribe(self, subscriber: Hashable) -> None:
        """End a subscription; nothing is delivered to it any more. Unknown subscribers are ignored."""
        self._claims.pop(subscriber, None)
        self._distribution.remove(subscriber)

    async def _check_publication(self, work: asyncpg.Connection) -> None:
        now = asyncio.get_running_loop().time()
        if self._published is not None and now - self._last_check < self._check_interval:
            return
        self._last_check = now
        found = await published(work, self._publication)
        if self._published not in (None, found):
            for subscription in self._distribution.subscriptions():
                await self._resubscribe(work, subscription)
        # Only now: what is broken off half-way is done again.
        self._published = found

    async def _resubscribe(self, work: asyncpg.Connection, former: Subscription) -> None:
        subscriber, claims = former.subscriber, self._claims.get(former.subscriber)
        if claims is None:
            return
        try:
            renewed = await check(work, self._publication, subscriber, former.bindings, claims)
        except BadSubscription as refusal:
            await self.unsubscribe(subscriber)
            if self.on_resubscribe_failed is not None:
                await self.on_resubscribe_failed(subscriber, refusal)
            return
        # It may have been ended, or made anew by its owner, while we asked.
        if self._distribution.replace(former, renewed) and self.on_resubscribed is not None:
            await self.on_resubscribed(subscriber)


class _Work:
    """The connection for everything but the slot; it can be lost and opened anew without a gap."""

    def __init__(self, connect: Callable[[], Awaitable[asyncpg.Connection]]) -> None:
        self._connect = connect
        self._connection: asyncpg.Connection | None = None

    async def do(self, action: Callable[[asyncpg.Connection], Awaitable[_Result]]) -> _Result:
        """Return what `action` gives with the connection; repeat it on a new one if that was lost."""
        for _ in range(_CONNECTIONS_TRIED):
            if self._connection is None:
                self._connection = await self._connect()
            try:
                return await action(self._connection)
            except _CONNECTION_ERRORS:
                if await self.alive():
                    raise
                self._connection = None
        raise ConnectionError("the database ends every connection at once")

    async def alive(self) -> bool:
        """Tell whether the connection still answers."""
        if self._connection is None or self._connection.is_closed():
            return False
        try:
            await self._connection.execute("select")
        except _CONNECTION_ERRORS:
            self._connection.terminate()
            return False
        return True


async def _close(connection: asyncpg.Connection) -> None:
    try:
        await connection.close(timeout=2)
    except _CONNECTION_ERRORS:
        connection.terminate()


def _brief(error: BaseException) -> str:
    if not isinstance(error, _CONNECTION_ERRORS):
        return _place(error)
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """Return what was raised and where; messages and tracebacks may hold the values of rows."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"
