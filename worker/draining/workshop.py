"""What a worker process needs to drain lanes, opened together: engine, Redis, handlers, catalogue, health.

Knows nothing of arq; jobs.py puts it under arq's worker, tests put it into their own loop.
"""

import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import structlog
from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker import loader, telemetry
from worker.cache import Cache
from worker.change import Context
from worker.database import make_engine, wait_until_up
from worker.draining.alerting import Alerting
from worker.draining.calls import Caller
from worker.draining.drain import Drain, make_limits
from worker.draining.items import Decoder
from worker.draining.trims import SECONDS as TRIM_SECONDS
from worker.draining.trims import Trims
from worker.draining.turns import SWEEP_SECONDS, Draining, Enqueue
from worker.fitting import load_handlers
from worker.forgetting import cached_tables
from worker.lanes import Lanes
from worker.positions import Seen
from worker.pulse import Pulse
from worker.queue import connection_pool
from worker.registry import Handler
from worker.retries import Backoff, Policy
from worker.schema_watch import SchemaWatch
from worker.tracing import traces_of

if TYPE_CHECKING:
    from supabase import AsyncClient

    from worker.supabase import SupabaseClients
    from worker.tracing.spans import Traces

log = structlog.get_logger(__name__)

AT_ONCE = 8
"""Lanes drained at the same time by one process, each on its own connection: a core has no use for more."""
DEAF_SECONDS = 10 * SWEEP_SECONDS


class _Clients:
    """Lends the Supabase client, whose libraries are loaded when a handler first asks for it.

    They take 8 MiB, and most handlers never ask. Where a handler's module imports them, for a type perhaps,
    they are loaded at the start.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: SupabaseClients | None = None

    def get(self) -> "AsyncClient":
        """Give the client."""
        if self._made is None:
            from worker.supabase import SupabaseClients  # noqa: PLC0415 - see above

            self._made = SupabaseClients(self._settings)
        return self._made.get()

    async def close(self) -> None:
        """Close what the client has opened."""
        if self._made is not None:
            await self._made.close()


class Workshop:
    """An open worker: its drains, and the tasks that keep them going."""

    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        draining: Draining,
        handlers: Sequence[Handler],
        watch: SchemaWatch,
        alerting: Alerting,
    ) -> None:
        self._watch = watch
        self._alerting = alerting
        self._settings = settings
        self._engine = engine
        self.draining = draining
        self.handlers = handlers

    @classmethod
    @asynccontextmanager
    async def open(
        cls, settings: Settings, enqueue: Enqueue, told: Callable[[str], None] | None = None
    ) -> AsyncIterator[Self]:
        """Open everything; waits for Postgres, and tells why.

        Raises:
            ConfigurationError: the handlers are wrong, or do not fit the database.
        """
        engine = make_engine(
            settings.database_url.get_secret_value(), name="tailrace worker", size=AT_ONCE + 2
        )
        redis: Redis = Redis(connection_pool=connection_pool(settings.redis_url.get_secret_value()))
        clients = _Clients(settings)
        tracing = AsyncExitStack()
        try:
            loader.load(settings.handlers)  # what is wrong with the code is told before any waiting
            traces = await tracing.enter_async_context(traces_of(settings, "worker"))
            await wait_until_up(engine, told=told)
            # Which delivery it is, and what that demands of the tables, is the listener's to judge.
            handlers, catalogue = await load_handlers(settings, engine, "proven")
            tables = {(one.schema, one.table) for handler in handlers for one in handler.subscriptions}
            watch = SchemaWatch(engine, catalogue, settings.publication, tables)
            pulse = Pulse()
            lanes = Lanes(redis, settings.queue)
            trims = Trims(lanes, TRIM_SECONDS)
            draining = Draining(
                name=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}",
                engine=engine,
                lanes=lanes,
                drains=await _drains(settings, engine, handlers, watch, clients, traces, pulse, trims),
                enqueue=enqueue,
                at_once=AT_ONCE,
                pulse=pulse,
                trims=trims,
            )
            cache = make_cache(redis, settings, handlers)
            alerting = Alerting(
                engine, handlers, lambda handler: _contexts(handler, redis, clients, cache)(None)
            )
            yield cls(settings, engine, draining, handlers, watch, alerting)
            await draining.leave()
        finally:
            await tracing.aclose()
            await clients.close()
            await redis.aclose(close_connection_pool=True)
            await engine.dispose()

    def tasks(self) -> list[tuple[Coroutine[Any, Any, None], str]]:
        """List what must run beside the jobs, for ever, each with its name."""
        tasks = [
            (self.draining.live(), "worker: live"),
            (self.draining.listen(), "worker: bells"),
            (self.draining.sweep(), "worker: sweep"),
            (self._watch.keep(), "worker: schema"),
        ]
        if self._alerting.needed:
            tasks.append((self._alerting.keep(), "worker: alerts"))
        return tasks

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether the worker gets on with its passes and its sweep, or has nothing to do."""
        stuck = self.draining.stuck()
        return not stuck, stuck

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell whether the worker reaches Postgres and Redis: whether its sweep has lately been round."""
        silent = time.time() - self.draining.swept_at
        if self.draining.stopping.is_set():
            return False, ["stopping"]
        if silent > DEAF_SECONDS:
            return False, ["Postgres or Redis cannot be reached: see the log"]
        if newer := self.draining.newer:
            return False, [newer]
        return True, []

    def notes(self) -> list[str]:
        """Tell what else there is to know: nothing."""
        return []

    async def samples(self) -> list[telemetry.Sample]:
        """Tell everything that `/metrics` shows."""
        ready, _ = await self.ready()
        draining = self.draining
        return telemetry.of_worker(ready=ready, meters=draining.meters, lanes=draining.lanes_now())

    async def status(self) -> dict[str, Any]:
        """Tell what this worker has done."""
        ready, reasons = await self.ready()
        return {
            "worker": self.draining.name,
            "ready": ready,
            "reasons": reasons,
            "handlers": [handler.name for handler in self.handlers],
            "applied": self.draining.applied,
            "lag_seconds": self.draining.lag_seconds,
        }


async def _drains(
    settings: Settings,
    engine: AsyncEngine,
    handlers: Sequence[Handler],
    watch: SchemaWatch,
    clients: _Clients,
    traces: "Traces | None",
    pulse: Pulse,
    trims: Trims,
) -> dict[str, Drain]:
    async with engine.connect() as connection:
        version = int((await connection.execute(text("show server_version_num"))).scalar_one())
    limits = make_limits({handler.name: handler for handler in handlers}, settings.handler_timeout, version)
    redis = trims.lanes.redis
    cache = make_cache(redis, settings, handlers)
    drains, seen = {}, Seen()
    for handler in handlers:
        backoff = Backoff(
            settings.backoff_seconds if handler.backoff is None else handler.backoff,
            settings.backoff_max_seconds if handler.backoff_max is None else handler.backoff_max,
        )
        caller = Caller(
            handler,
            timeout=handler.timeout or settings.handler_timeout,
            policy=Policy(
                backoff,
                handler.max_attempts or settings.max_attempts,
                frozenset(settings.give_up_on),
                handler.after == "halt",
                settings.retries_per_second,
            ),
            context=_contexts(handler, redis, clients, cache),
            cached=cache.tables,
            traces=traces,
        )
        drains[handler.name] = Drain(
            engine=engine,
            trims=trims,
            caller=caller,
            decoder=Decoder(handler, watch),
            limits=limits,
            batch=settings.batch,
            seen=seen,
            pulse=pulse,
        )
    return drains


def make_cache(redis: Redis, settings: Settings, handlers: Sequence[Handler]) -> Cache:
    """Make the cache of these handlers."""
    return Cache(redis, settings.queue, cached_tables(handler.function for handler in handlers))


def _contexts(handler: Handler, redis: Redis, clients: _Clients, cache: Cache) -> Any:  # noqa: ANN401 - a function from key to context
    logger = structlog.get_logger(handler.function.__module__).bind(handler=handler.name)

    def make(idempotency_key: str | None) -> Context:
        # The key ends with the position of the only change that the call is for.
        log = logger if idempotency_key is None else logger.bind(position=idempotency_key.rpartition(":")[2])
        return Context(redis, log, idempotency_key, clients.get, lambda: cache)

    return make


__all__ = ["Workshop"]
