"""What every reading stands on, whatever its delivery."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import structlog
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker import gaps, lease
from worker.backfill import Backfills
from worker.catalogue import Catalogue
from worker.database import explain, is_away, singly
from worker.lanes import Lane, Lanes, LeaseLostError
from worker.pulse import Pulse, beat
from worker.reading.crosscheck import CrossCheck
from worker.reading.journal import Journal
from worker.reading.schema import Schema
from worker.realtime import RealtimeSource
from worker.registry import Handler
from worker.source import Gap, RereadError, SourceHealth

if TYPE_CHECKING:
    from worker.tracing.spans import Traces

log = structlog.get_logger(__name__)

CANARY = ("tailrace", "canary")
AGAIN_SECONDS = 1.0
BACKFILLS_AT_ONCE = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Ground:
    """What a listener hands to its readings."""

    settings: Settings
    engine: AsyncEngine
    lanes: Lanes
    handlers: Sequence[Handler]
    catalogue: Catalogue
    enqueue: Callable[[Lane], Awaitable[None]]
    alive: Callable[[], None]
    """Called while a step waits, so that waiting does not look like being stuck."""
    trouble: Callable[[str | None], None]
    """Is told why Postgres cannot be used, or None."""
    traces: "Traces | None" = None
    """Where changes are traced."""
    pulse: Pulse = field(default_factory=Pulse)
    """Is told of each batch that is taken in."""
    tables: tuple[tuple[str, str], ...] = field(init=False)
    """All tables of the handlers, as (schema, table)."""
    schema: Schema = field(init=False)
    crosscheck: CrossCheck = field(init=False, default_factory=CrossCheck)
    """Its totals outlive a reading."""

    def __post_init__(self) -> None:
        tables = {(one.schema, one.table) for handler in self.handlers for one in handler.subscriptions}
        object.__setattr__(self, "tables", tuple(sorted(tables)))
        publication = self.settings.publication
        schema = Schema(self.engine, self.handlers, self.catalogue, publication, self.record)
        object.__setattr__(self, "schema", schema)

    async def in_redis(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step in Redis, waiting for Redis as long as it takes."""
        told = False
        while True:
            try:
                return await step()
            except (RedisError, OSError) as error:
                if not told:
                    reason = "REDIS_URL cannot be reached"
                    log.warning("waiting for Redis", reason=reason, error_class=type(error).__name__)
                    told = True
                self.alive()
                beat()
                await asyncio.sleep(AGAIN_SECONDS)

    async def in_postgres(self, step: Callable[[], Awaitable[T]]) -> T:
        """Do a step in Postgres, waiting for Postgres as long as it takes."""
        while True:
            try:
                return await step()
            except Exception as error:
                if not is_away(error):
                    raise
                self.trouble(explain(error))
                self.alive()
                beat()
                await asyncio.sleep(AGAIN_SECONDS)

    async def holding(self, token: str, step: Awaitable[None]) -> None:
        """Take a step that may take long, and renew the lease meanwhile.

        Raises:
            LeaseLostError: another listener has taken over; the step is cancelled.
        """
        work = asyncio.ensure_future(step)
        told = False
        try:
            while not (await asyncio.wait({work}, timeout=lease.RENEW_SECONDS))[0]:
                try:
                    await lease.renew(self.engine, token, None)
                except Exception as error:
                    if not is_away(error):
                        raise
                self.alive()
                if not told:
                    log.info("the start takes long: it may wait for open transactions, or for Redis")
                    told = True
            work.result()
        finally:
            work.cancel()
            await asyncio.wait({work})

    async def record(self, gap: Gap) -> None:
        """Record a gap, waiting for Postgres as long as it takes."""
        tables = [table for table in gap.tables if table != CANARY]
        if not tables:
            return
        log.warning("gap", cause=gap.cause, tables=[f"{schema}.{table}" for schema, table in tables[:5]])

        async def write() -> None:
            async with self.engine.begin() as connection:
                await gaps.record(
                    connection, cause=gap.cause, tables=tables, since=gap.since, until=gap.until
                )

        await self.in_postgres(write)

    def realtime(
        self, write_canary: Callable[[], Awaitable[str]], *, doorbell: bool = False
    ) -> RealtimeSource:
        """Make a source of what Realtime sends for all tables."""
        settings = self.settings
        return RealtimeSource(
            settings.realtime_url,
            settings.service_role_key.get_secret_value(),
            self.tables,
            write_canary,
            canary_seconds=settings.canary_seconds,
            publication=settings.publication,
            doorbell=doorbell,
        )

    async def write_canary(self, token: str = "") -> str:
        """Change the canary's row; returns what must come back."""
        token = token or lease.new_name()
        async with singly(self.engine) as connection:
            await connection.execute(
                text("update tailrace.canary set token = :token, written_at = clock_timestamp()"),
                {"token": token},
            )
        return token


class Reading(Protocol):
    """Reads under one lease."""

    journal: Journal | None
    """Where it writes; None before `begin`."""
    lanes: int
    """Lanes of each handler."""

    async def begin(self) -> None:
        """Find or make the generation, and bring handlers and lanes into line with what is loaded."""
        ...

    async def run(self) -> None:
        """Read for ever.

        Raises (in an ExceptionGroup):
            LeaseLostError: another listener has taken over.
            RereadError: the source must be read again.
        """
        ...

    async def tick(self) -> None:
        """Do what is due every two seconds. Postgres may be away: that is the caller's to wait for."""
        ...

    def filtered(self) -> Mapping[str, int]:
        """Count the changes that were filtered out and are not yet noted in Postgres, by handler."""
        ...

    def sure_until(self) -> datetime | None:
        """Up to when everything that was committed is written down; None where nobody knows."""
        ...

    def slot(self) -> dict[str, Any] | None:
        """Tell the state of the replication slot; None where there is none."""
        ...

    def realtime(self) -> SourceHealth:
        """Tell the state of Realtime."""
        ...

    def reasons(self) -> list[str]:
        """Tell why not every commit from now on will be delivered; empty when it will."""
        ...

    def notes(self) -> list[str]:
        """Tell what a person should know though it is no reason to be unready."""
        ...

    def read_to(self) -> int | None:
        """Tell the LSN below which every commit is in its lanes; None where positions are not the log's."""
        ...

    def compared(self) -> tuple[int, int] | None:
        """Count what Realtime left out, and what it sent besides; None where nothing tells."""
        ...


async def backfill(backfills: Backfills) -> None:
    """Carry out backfills for ever, a few at a time: a large one must not hold up the others.

    Raises (in an ExceptionGroup):
        LeaseLostError: another listener has taken over.
        RereadError: the source must be read again.
    """
    async with asyncio.TaskGroup() as group:
        for _ in range(BACKFILLS_AT_ONCE):
            group.create_task(_backfill(backfills), name="listener: backfill")


async def _backfill(backfills: Backfills) -> None:
    while True:
        try:
            while await backfills.once():
                pass
        except (LeaseLostError, RereadError):
            raise
        except (RedisError, OSError) as error:
            log.warning("backfill waits for Redis", error_class=type(error).__name__)
        except Exception as error:
            if not is_away(error):
                # A table dropped or altered under our feet ends no process; the backfill is tried again.
                log.exception("backfill failed", error_class=type(error).__name__)
            await asyncio.sleep(AGAIN_SECONDS)
        await backfills.wait()
