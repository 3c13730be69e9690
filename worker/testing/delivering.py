"""Delivers a test's writes to handlers in one transaction that is rolled back: no listener and no worker.

Everything in between is production's: the change is decoded from Postgres's text, routed by filter and
columns, typed, and handed over with time limit and role. Not the whole pipeline, which is in pipeline.py:
nothing is tried again, and what handlers write reaches no further handler.
"""

import asyncio
import secrets
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import structlog
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker.cache import Cache
from worker.change import Change, Context, Position, RawChange
from worker.database import make_engine
from worker.draining.applying import MOST_AT_ONCE
from worker.draining.calls import Caller
from worker.draining.items import Decoder
from worker.forgetting import cached_tables
from worker.queue import connection_pool
from worker.registry import Handler
from worker.retries import Backoff, Policy
from worker.routing import Router
from worker.schema_watch import SchemaWatch
from worker.testing.rows import Rows
from worker.testing.stack import Database, same_loop
from worker.testing.writes import Write

if TYPE_CHECKING:
    from supabase import AsyncClient

_AT_ONCE = text("set constraints all immediate")
_AT_COMMIT = text("set constraints all deferred")


@dataclass
class _Call:
    """What one handler is to be given."""

    handler: Handler
    changes: list[tuple[Position, RawChange]] = field(default_factory=list)
    keys: dict[bytes, None] = field(default_factory=dict)


class Deliver:
    """Writes rows and calls the handlers that want to know; the fixture `deliver`.

    Attributes:
        supabase: what handlers get as `context.supabase`: give it a double, if they ask for it.
    """

    def __init__(self, database: Database, supabase: "AsyncClient | Any" = None) -> None:  # noqa: ANN401 - a double is of any type
        self.supabase = supabase
        self._database = database
        self._stack = AsyncExitStack()
        self._loop = asyncio.get_running_loop()
        self._lsn = 0
        self._engine: AsyncEngine
        self._connection: AsyncConnection
        self._session: AsyncSession
        self._rows: Rows
        self._redis: Redis
        self._cache: Cache

    async def __aenter__(self) -> Self:
        database = self._database
        self._engine = make_engine(database.url, name="tailrace tests", size=1)
        self._stack.push_async_callback(self._engine.dispose)
        self._redis = Redis(connection_pool=connection_pool(database.redis_url))
        self._stack.push_async_callback(self._redis.aclose, close_connection_pool=True)
        # What a test has computed from rows that are rolled back is no other test's.
        prefix = f"{database.settings.queue}:{secrets.token_hex(6)}"
        self._cache = Cache(self._redis, prefix, cached_tables(one.function for one in database.handlers))
        self._connection = await self._engine.connect()
        self._stack.push_async_callback(self._connection.close)
        transaction = await self._connection.begin()
        self._stack.push_async_callback(transaction.rollback)
        self._session = self._open_session()
        self._stack.push_async_callback(self._session.close)
        publication = database.settings.publication
        self._rows = Rows(self._connection, dict(database.catalogue.tables), publication)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def session(self) -> AsyncSession:
        """A session in the transaction, to put rows there and to look at what came of it."""
        same_loop(self._loop)
        return self._session

    def _open_session(self) -> AsyncSession:
        # What is committed in it is so for the test alone: the transaction is the connection's.
        mode = "create_savepoint"
        return AsyncSession(bind=self._connection, join_transaction_mode=mode, expire_on_commit=False)

    async def __call__(self, *writes: Write, to: Callable[..., Any] | str | None = None) -> tuple[str, ...]:
        """Write rows as one transaction of the application, and call the handlers with the changes.

        Args:
            *writes: of `insert`, `update` and `delete`.
            to: the one handler to call, as function or by name; by default all that want the changes.

        Returns:
            Names of the handlers that were called: none where filter or columns left everything out.

        Raises:
            LookupError: no such table, row or handler; or nobody subscribes to any of the tables.
            Exception: whatever a handler raises; then its own writes are undone, those of the test stay.
        """
        same_loop(self._loop)
        handlers = self._wanted(writes, to)
        await self._session.flush()
        self._lsn += 1
        changes = [
            (Position(self._lsn, ordinal), await self._rows.write(write, self._lsn, ordinal))
            for ordinal, write in enumerate(writes)
        ]
        calls = self._route(handlers, changes)
        for call in calls:
            await self._call(call)
        # What is asked for next is read anew. Not expired: to read an attribute must not need the database.
        self._session.expunge_all()
        return tuple(call.handler.name for call in calls)

    def _wanted(self, writes: Sequence[Write], to: Callable[..., Any] | str | None) -> list[Handler]:
        every = self._database.handlers
        tables = {(write.schema, write.table) for write in writes}
        found = [
            handler
            for handler in every
            if (to is None and tables & {(one.schema, one.table) for one in handler.subscriptions})
            or (to is not None and (handler.function is to or handler.name == to))
        ]
        if found:
            return found
        known = ", ".join(handler.name for handler in every)
        if to is not None:
            shown = to if isinstance(to, str) else getattr(to, "__qualname__", to)
            raise LookupError(
                f"{shown} is none of the handlers: {known}; fixture tailrace_handlers names modules"
            )
        names = ", ".join(sorted(".".join(one) for one in tables))
        raise LookupError(f"no handler subscribes to {names}; there are: {known}")

    def _route(
        self, handlers: Sequence[Handler], changes: Sequence[tuple[Position, RawChange]]
    ) -> list[_Call]:
        router = Router(handlers, self._database.catalogue, 1)
        calls = {handler.name: _Call(handler) for handler in handlers}
        for position, raw in changes:
            routes = router.route(raw)
            for handler, reason in routes.unroutable:
                raise LookupError(f"{handler.name} cannot be given this {raw.type}: {reason}")
            for routed in routes.matched:
                call = calls[routed.handler.name]
                call.changes.append((position, raw))
                call.keys.update(dict.fromkeys(routed.keys))
        return [call for call in calls.values() if call.changes]

    async def _call(self, call: _Call) -> None:
        handler, settings = call.handler, self._database.settings
        caller = Caller(
            handler,
            timeout=handler.timeout or settings.handler_timeout,
            policy=Policy(Backoff(settings.backoff_seconds, settings.backoff_max_seconds), 1),
            context=lambda key: self._context(handler, key),
            cached=self._cache.tables,
        )
        names = [(one.schema, one.table) for one in handler.subscriptions]
        watch = SchemaWatch(self._engine, self._database.catalogue, settings.publication, names)
        decoder = Decoder(handler, watch)
        # One of its own, as in a pass of the worker: it knows no instance before it loads it.
        async with self._open_session() as session, session.begin():
            if handler.kind == "derive":
                keys: list[Any] = [decoder.key(key) for key in call.keys]
                for portion in _portions(keys, handler.batch):
                    await caller.keys(session, portion)
            else:
                built = await decoder.built(session, [(position, raw, 1) for position, raw in call.changes])
                ordered = [built[position] for position, _ in call.changes]
                for some in _portions(ordered, handler.batch):
                    await caller.changes(session, some, lambda change: _key(handler, change))
            connection = await session.connection()
            await connection.execute(_AT_ONCE)
            await connection.execute(_AT_COMMIT)

    def _context(self, handler: Handler, key: str | None) -> Context:
        log = structlog.get_logger(handler.function.__module__).bind(handler=handler.name)
        return Context(self._redis, log, key, self._get_supabase, lambda: self._cache)

    def _get_supabase(self) -> Any:  # noqa: ANN401 - a double is of any type
        if self.supabase is None:
            raise LookupError(
                "the handler asks for context.supabase, and tests reach no project: give it a double, as in"
                " deliver.supabase = …"
            )
        return self.supabase


def _portions(items: list[Any], most: int | None) -> list[list[Any]]:
    size = most or MOST_AT_ONCE
    return [items[start : start + size] for start in range(0, len(items), size)]


def _key(handler: Handler, change: Change) -> str:
    return f"test:{handler.name}:{change.position}"
