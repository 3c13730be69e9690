"""Process 1: reads the source, routes each change, writes it into lanes.

One listener works, any further one stands by. A change goes from here in four steps: the source yields it
(realtime/), the router says whose it is (routing.py), the journal gives it a position and writes it
(journal.py), and a worker drains it (drain.py).
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker import delivery, gaps, layout, lease, positions, status
from worker.backfill import Backfills
from worker.catalogue import Catalogue
from worker.change import Position, RawChange
from worker.database import explain, is_away
from worker.journal import Clock, Journal
from worker.lanes import Backlog, Lane, Lanes, LanesLostError, LaneWriter, LeaseLostError
from worker.realtime import RealtimeSource
from worker.registry import Handler
from worker.routing import Router
from worker.source import Gap, Source, SourceHealth

log = structlog.get_logger(__name__)

CANARY = ("tailrace", "canary")
FLUSH = 500
"""Changes in one script call: more would hold up Redis for everybody."""
STANDBY_SECONDS = 1.0
FULL_SECONDS = 0.1

Enqueue = Callable[[Lane], Awaitable[None]]


class Listener:
    """What the listener process does between opening and closing its resources."""

    def __init__(
        self,
        settings: Settings,
        *,
        engine: AsyncEngine,
        redis: Redis,
        handlers: Sequence[Handler],
        catalogue: Catalogue,
        enqueue: Enqueue,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._lanes = Lanes(redis, settings.queue)
        self._handlers = tuple(handlers)
        self._catalogue = catalogue
        self._enqueue = enqueue
        self._choice = delivery.choose(settings.delivery)
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._source: RealtimeSource | None = None
        self._journal: Journal | None = None
        self._tables = tuple(
            sorted({(one.schema, one.table) for handler in handlers for one in handler.subscriptions})
        )
        self._standing_by = True
        self._database_trouble: str | None = None
        self._ticked = time.monotonic()
        self._owed: dict[tuple[str, tuple[str, str]], Gap] = {}
        self._waiting = False
        """The reader has nothing in hand: all that it took is in the lanes."""
        self._sure: datetime | None = None
        """Up to when nothing can have been lost unseen, even if this process ends now."""
        self.read = 0

    # Life

    async def run(self) -> None:
        """Listen for ever: stand by until the lease is free, then read until it is lost."""
        while True:
            token = lease.new_name()
            await self._wait_for_lease(token)
            try:
                await self._serve(token)
            except* LeaseLostError:
                log.warning("another listener has taken over: standing by")
            except* Exception as group:
                if not is_away(group.exceptions[0]):
                    raise
                log.warning("starting again", reason=explain(group.exceptions[0]))
                await asyncio.sleep(STANDBY_SECONDS)
            finally:
                self._standing_by = True
                self._journal = self._source = None

    async def _wait_for_lease(self, token: str) -> None:
        told = False
        while True:
            self._ticked = time.monotonic()
            try:
                if await lease.take(self._engine, token, self._holder):
                    self._database_trouble = None
                    return
                self._database_trouble = None
                if not told:
                    log.info("another listener is active: standing by")
                    told = True
            except Exception as error:
                if not is_away(error):
                    raise
                self._trouble(explain(error))
            await asyncio.sleep(STANDBY_SECONDS)

    def _trouble(self, reason: str | None) -> None:
        if reason is not None and reason != self._database_trouble:
            log.warning("waiting for Postgres", reason=reason)
        self._database_trouble = reason

    async def _serve(self, token: str) -> None:
        """Work under one lease, until it is lost or the process stops."""
        journal, lanes, live_at = await self._begin(token)
        source = RealtimeSource(
            self._settings.realtime_url,
            self._settings.service_role_key.get_secret_value(),
            self._tables,
            self._write_canary,
            canary_seconds=self._settings.canary_seconds,
            publication=self._settings.publication,
        )
        router = Router(self._handlers, self._catalogue, lanes)
        backfills = Backfills(self._engine, self._handlers, self._catalogue, self._put_keys)
        self._journal, self._source, self._standing_by = journal, source, False
        self._sure, self._waiting = None, False
        log.info(
            "listening",
            delivery=self._choice.delivery,
            reason=self._choice.reason,
            tables=len(self._tables),
            handlers=len(self._handlers),
            lanes=lanes,
        )
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(source, router, journal), name="listener: read")
                group.create_task(
                    self._tick(token, source, journal, live_at, backfills), name="listener: tick"
                )
                group.create_task(self._backfill(backfills), name="listener: backfill")
        finally:
            await self._give_up(token)

    async def _give_up(self, token: str) -> None:
        try:
            async with asyncio.timeout(2):
                await asyncio.shield(lease.give_up(self._engine, token, self._sure))
        except Exception as error:  # noqa: BLE001 - on the way out: the lease ends by itself anyway
            log.info("the lease ends by itself", error_class=type(error).__name__)

    async def _begin(self, token: str) -> tuple[Journal, int, datetime | None]:
        """Find or make the generation, and bring handlers and lanes into line with what is loaded."""
        async with self._engine.connect() as connection:
            source = await positions.read_source(connection)
            greatest = await positions.greatest(connection)
            live_at = await lease.live_since(connection)
            await connection.commit()
        writer, settled = await self._find_generation(source.generation, source.floor, token)
        last = writer.last if writer is not None else Position(0, 0)
        clock = Clock(max(greatest, source.floor, last))
        present = clock.next()
        fresh = writer is None
        if writer is None:
            writer = LaneWriter(self._lanes, lease.new_name(), token, present)
            await self._patiently(writer.begin)
        async with self._engine.begin() as connection:
            lanes = await layout.agree(
                connection, self._handlers, self._settings.lanes, present, settled=settled
            )
            floor = present if fresh else source.floor
            await lease.set_generation(connection, token, writer.generation, floor)
            if fresh and source.generation is not None:
                cause = "Redis had lost the lanes when the listener started"
                await gaps.record(connection, cause=cause, tables=self._tables, since=live_at)
                log.error("gap", cause=cause, tables=len(self._tables))
        journal = Journal(
            engine=self._engine,
            lanes=self._lanes,
            writer=writer,
            token=token,
            clock=clock,
            tables=self._tables,
            lane_count=lanes,
            enqueue=self._enqueue,
        )
        return journal, lanes, live_at

    async def _find_generation(
        self, generation: str | None, floor: Position, token: str
    ) -> tuple[LaneWriter | None, bool]:
        """Take over the generation that Postgres names, where Redis still has it.

        Returns its writer, or None; and whether nothing is under way.
        """
        if generation is None:
            return None, True
        writer = LaneWriter(self._lanes, generation, token, floor)
        if not await self._patiently(writer.take_over):
            return None, True
        backlog = await self._patiently(writer.backlog)
        return writer, backlog.entries == 0

    async def _patiently(self, step: Callable[[], Awaitable[Any]]) -> Any:  # noqa: ANN401 - whatever the step gives
        """Do a step in Redis, waiting for Redis as long as it takes."""
        told = False
        while True:
            try:
                return await step()
            except (RedisError, OSError) as error:
                if not told:
                    log.warning(
                        "waiting for Redis",
                        reason="REDIS_URL cannot be reached",
                        error_class=type(error).__name__,
                    )
                    told = True
                self._ticked = time.monotonic()
                await asyncio.sleep(STANDBY_SECONDS)

    # Reading

    async def _read(self, source: Source, router: Router, journal: Journal) -> None:
        async with aclosing(source.read()) as batches:  # type: ignore[type-var] # sources are async generators
            self._waiting = True
            async for batch in batches:
                self._waiting = False
                at = time.time()
                await self._until_room(journal)
                staged = 0
                for one in batch:
                    if isinstance(one, Gap):
                        await journal.flush()
                        await self._record(one)
                        continue
                    staged += self._take(one, router, journal, at)
                    if staged >= FLUSH:
                        await journal.flush()
                        staged = 0
                await journal.flush()
                self._waiting = True

    def _take(self, raw: RawChange, router: Router, journal: Journal, at: float) -> int:
        if (raw.schema, raw.table) == CANARY:
            return 0
        self.read += 1
        routes = router.route(raw)
        for handler in routes.filtered:
            journal.filtered[handler.name] += 1
        for handler, reason in routes.unroutable:
            self._cannot_route(raw, handler, reason)
        if routes.matched:
            journal.add(raw, routes.matched, at)
        return len(routes.matched)

    def _cannot_route(self, raw: RawChange, handler: Handler, reason: str) -> None:
        """Owe a gap for what a handler cannot be given; one for each handler, table and tick."""
        now = datetime.now(UTC)
        table = (raw.schema, raw.table)
        since, cause = now, f"a change could not be routed to {handler.name}: {reason}"
        if (handler.name, table) in self._owed:
            since = self._owed[handler.name, table].since or now
        else:
            log.error(
                "change cannot be routed",
                handler=handler.name,
                table=f"{raw.schema}.{raw.table}",
                reason=reason,
            )
        self._owed[handler.name, table] = Gap(since, now, cause, (table,))

    async def _record(self, gap: Gap) -> None:
        tables = [table for table in gap.tables if table != CANARY]
        if not tables:
            return
        log.warning("gap", cause=gap.cause, tables=[f"{schema}.{table}" for schema, table in tables[:5]])
        while True:
            try:
                async with self._engine.begin() as connection:
                    await gaps.record(
                        connection, cause=gap.cause, tables=tables, since=gap.since, until=gap.until
                    )
            except Exception as error:
                if not is_away(error):
                    raise
                self._trouble(explain(error))
                await asyncio.sleep(STANDBY_SECONDS)
            else:
                return

    async def _until_room(self, journal: Journal) -> None:
        """Stop reading while the lanes are full: the source holds the rest."""
        told = False
        while True:
            try:
                backlog = await journal.backlog()
            except (RedisError, OSError):
                return  # the flush will wait for Redis, and says so
            if self._has_room(backlog):
                if told:
                    log.info("reading goes on")
                return
            if not told:
                log.warning("the lanes are full: reading stops", entries=backlog.entries, size=backlog.size)
                told = True
            await asyncio.sleep(FULL_SECONDS)

    def _has_room(self, backlog: Backlog) -> bool:
        settings = self._settings
        return backlog.entries < settings.max_backlog and backlog.size < settings.max_backlog_bytes

    async def _put_keys(self, handler: Handler, keys: Sequence[bytes]) -> None:
        """Write a backfill's keys; live changes go first."""
        journal = self._journal
        if journal is None:
            raise LanesLostError("the listener does not listen")
        while (await journal.backlog()).entries > self._settings.max_backlog // 2:  # noqa: ASYNC110 - Redis sends no event
            await asyncio.sleep(FULL_SECONDS)
        if keys:
            await journal.put_keys(handler, keys)

    async def _backfill(self, backfills: Backfills) -> None:
        while True:
            try:
                while await backfills.once():
                    pass
            except (RedisError, OSError) as error:
                log.warning("backfill waits for Redis", error_class=type(error).__name__)
            except Exception as error:
                if not is_away(error):
                    # A table dropped or altered under our feet ends no process; the backfill is tried again.
                    log.exception("backfill failed", error_class=type(error).__name__)
                await asyncio.sleep(STANDBY_SECONDS)
            await backfills.wait()

    # Looking after

    async def _tick(
        self,
        token: str,
        source: RealtimeSource,
        journal: Journal,
        live_at: datetime | None,
        backfills: Backfills,
    ) -> None:
        """Every two seconds: the lease, the lanes, the counters; and the gap from before the start."""
        owed = live_at
        arrived: datetime | None = None
        while True:
            try:
                await self._pay()
                # What had arrived by the last tick is in the lanes once the reader waits for more. Arrived
                # alone is not enough: what dies with this process on its way to Redis would be in no gap.
                self._sure = arrived if self._waiting else self._sure
                arrived = source.sure_until
                await lease.renew(self._engine, token, self._sure)
                await self._note_filtered(journal)
                if owed is not None and (since := source.subscribed_since) is not None:
                    cause = "the listener was not running"
                    await self._record(Gap(owed, since, cause, self._tables))
                    owed = None
                    backfills.ask()
                self._trouble(None)
            except LeaseLostError:
                raise
            except Exception as error:
                if not is_away(error):
                    raise
                self._trouble(explain(error))
            await journal.check()
            self._ticked = time.monotonic()
            await asyncio.sleep(lease.RENEW_SECONDS)

    async def _pay(self) -> None:
        """Record the gaps that are owed; one that has grown meanwhile is owed again."""
        for name, gap in list(self._owed.items()):
            await self._record(gap)
            if self._owed.get(name) is gap:
                del self._owed[name]

    async def _note_filtered(self, journal: Journal) -> None:
        if not journal.filtered:
            return
        counts, journal.filtered = journal.filtered, type(journal.filtered)()
        async with self._engine.begin() as connection:
            for name, count in counts.items():
                await connection.execute(
                    text("update tailrace.handlers set filtered = filtered + :count where name = :name"),
                    {"name": name, "count": count},
                )

    async def _write_canary(self) -> str:
        token = lease.new_name()
        async with self._engine.begin() as connection:
            await connection.execute(
                text("update tailrace.canary set token = :token, written_at = clock_timestamp()"),
                {"token": token},
            )
        return token

    # Health

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether the listener's own loop still turns."""
        silent = time.monotonic() - self._ticked
        return (True, []) if silent < 60 else (False, [f"the listener has not ticked for {silent:.0f} s"])  # noqa: PLR2004 - a minute

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell whether every commit from now on will be delivered, and if not, why not."""
        reasons = []
        if self._database_trouble is not None:
            reasons.append(self._database_trouble)
        journal, source = self._journal, self._source
        if journal is None or source is None:
            reasons.append(
                "standing by: another listener is active" if self._standing_by and not reasons else "starting"
            )
        else:
            if journal.trouble is not None:
                reasons.append(journal.trouble)
            reasons += source.health().reasons
        return not reasons, reasons

    async def status(self) -> dict[str, Any]:
        """Tell everything that `/status` shows."""
        ready, reasons = await self.ready()
        source = self._source
        health = source.health() if source is not None else SourceHealth(False, (), False, False, None, None)  # noqa: FBT003 - a tuple's fields
        state = await status.read(self._engine, self._lanes)
        for name, count in (self._journal.filtered if self._journal else {}).items():
            state["handlers"][name]["filtered"] += count
            state["handlers"][name]["read"] += count
        return state | {
            "delivery": self._choice.delivery,
            "reason": self._choice.reason,
            "ready": ready,
            "reasons": reasons,
            "realtime": {
                "connected": health.connected,
                "subscribed": health.subscribed,
                "missed": None,
                "extra": None,
                "lag_seconds": health.lag_seconds,
                "canary_seconds": health.canary_seconds,
            },
        }
