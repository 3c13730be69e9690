"""Process 1: reads the source, routes each change, writes it into lanes.

One listener works, any further one stands by. A change goes from here in four steps: the source yields it
(realtime/), the reading takes it in (reading/) and the router says whose it is (routing.py), the journal
gives it a position and writes it (reading/journal.py), and a worker drains it (draining/).
"""

import asyncio
import math
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import structlog
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker import delivery, lease, status, telemetry
from worker.catalogue import Catalogue
from worker.database import explain, is_away
from worker.errors import NewerFormat
from worker.lanes import Lane, Lanes, LeaseLostError
from worker.pulse import STUCK_SECONDS, Pulse
from worker.reading import Ground, PlainReading, ProvenReading, Reading
from worker.registry import Handler
from worker.source import RereadError, SourceHealth

if TYPE_CHECKING:
    from worker.tracing.spans import Traces

log = structlog.get_logger(__name__)

STANDBY_SECONDS = 1.0
STANDING_BY = "standing by: another listener is active"
_NO_REALTIME = SourceHealth(
    ready=False, reasons=(), connected=False, subscribed=False, canary_seconds=None, lag_seconds=None
)


class Listener:
    """What the listener process does between opening and closing its resources."""

    def __init__(
        self,
        settings: Settings,
        choice: delivery.Choice,
        *,
        engine: AsyncEngine,
        redis: Redis,
        handlers: Sequence[Handler],
        catalogue: Catalogue,
        enqueue: Callable[[Lane], Awaitable[None]],
        traces: "Traces | None" = None,
    ) -> None:
        self._engine = engine
        self._lanes = Lanes(redis, settings.queue)
        self._choice = choice
        self._pulse = Pulse()
        self._ground = Ground(
            settings=settings,
            engine=engine,
            lanes=self._lanes,
            handlers=tuple(handlers),
            catalogue=catalogue,
            enqueue=enqueue,
            alive=self._alive,
            trouble=self._trouble,
            traces=traces,
            pulse=self._pulse,
        )
        self._holder = f"{socket.gethostname()}:{os.getpid()}"
        self._reading: Reading | None = None
        self._sure: datetime | None = None
        self._reread_reason: str | None = None
        self._standing_by = False
        self._newer: str | None = None
        """Why a listener of another version must read in place of this one."""
        self._database_trouble: str | None = None
        self._ticked = time.monotonic()
        self._rereads = self._connections = 0

    # Life

    async def run(self) -> None:
        """Listen for ever: stand by until the lease is free, then read until it is lost."""
        while True:
            token = lease.new_name()
            await self._wait_for_lease(token)
            await self._read_under(token)

    async def _read_under(self, token: str) -> None:
        """Read, and read again, until the lease is lost or must be taken anew."""
        again = True
        try:
            while again:
                again = False
                try:
                    await self._serve(token)
                except* LeaseLostError:
                    log.warning("another listener has taken over: standing by")
                except* RereadError as group:
                    again = True
                    await self._before_again(group)
                except* Exception as group:
                    if not is_away(_first(group)):
                        raise
                    log.warning("starting again", reason=explain(_first(group)))
                    await asyncio.sleep(STANDBY_SECONDS)
                finally:
                    self._reading = None
        finally:
            await self._give_up(token)

    async def _before_again(self, group: ExceptionGroup[RereadError]) -> None:
        error = _first(group)
        self._rereads += 1
        if str(error) != self._reread_reason:  # what waits is said once
            log.warning("reading again from the slot", reason=str(error))
        self._reread_reason = str(error)
        self._alive()
        await asyncio.sleep(error.seconds if isinstance(error, RereadError) else 0)

    async def _wait_for_lease(self, token: str) -> None:
        while True:
            self._alive()
            try:
                if await lease.take(self._engine, token, self._holder):
                    self._standing_by = False
                    self._newer = None
                    self._trouble(None)
                    return
            except NewerFormat as error:
                if self._newer is None:
                    log.warning("waiting for an upgrade", reason=str(error))
                self._trouble(None)
                self._newer = str(error)
            except Exception as error:
                if not is_away(error):
                    raise
                self._trouble(explain(error))
            else:
                self._trouble(None)
                self._newer = None
                if not self._standing_by:
                    log.info("another listener is active: standing by")
                self._standing_by = True
            await asyncio.sleep(STANDBY_SECONDS)

    async def _serve(self, token: str) -> None:
        """Work under one lease, until it is lost or the process stops."""
        ground = self._ground
        reading: Reading = PlainReading(ground, token)
        if self._choice.delivery == "proven":
            reading = ProvenReading(ground, token)
        await ground.holding(token, reading.begin())
        try:
            self._reading = reading
            self._reread_reason = None
            log.info(
                "listening",
                delivery=self._choice.delivery,
                reason=self._choice.reason,
                tables=len(ground.tables),
                handlers=len(ground.handlers),
                lanes=reading.lanes,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(reading.run(), name="listener: reading")
                group.create_task(self._tick(token, reading), name="listener: tick")
        finally:
            self._sure = reading.sure_until()
            self._connections += reading.realtime().connections
            self._reading = None

    async def _give_up(self, token: str) -> None:
        try:
            async with asyncio.timeout(2):
                await asyncio.shield(lease.give_up(self._engine, token, self._sure))
        except Exception as error:  # noqa: BLE001 - on the way out: the lease ends by itself anyway
            log.info("the lease ends by itself", error_class=type(error).__name__)

    async def _tick(self, token: str, reading: Reading) -> None:
        """Every two seconds: what the reading owes, and the lease."""
        looks_at = time.monotonic() + lease.FROZEN_SECONDS
        while True:
            try:
                if time.monotonic() >= looks_at:
                    await lease.end_frozen_before(self._engine)
                    looks_at = math.inf
                await reading.tick()
                await lease.renew(self._engine, token, reading.sure_until())
            except LeaseLostError:
                raise
            except Exception as error:
                if not is_away(error):
                    raise
                self._trouble(explain(error))
            else:
                self._trouble(None)
            self._alive()
            await asyncio.sleep(lease.RENEW_SECONDS)

    def _alive(self) -> None:
        self._ticked = time.monotonic()

    def _trouble(self, reason: str | None) -> None:
        if reason is not None and reason != self._database_trouble:
            log.warning("waiting for Postgres", reason=reason)
        self._database_trouble = reason

    # Health

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether the listener stands by or goes its rounds, and gets on with what it has read."""
        silent = time.monotonic() - self._ticked
        ticks = [] if silent < STUCK_SECONDS else [f"no tick of the listener for {silent:.0f} s"]
        reasons = [*ticks, *self._pulse.stuck()]
        return not reasons, reasons

    def doing(self) -> str:
        """Tell in a few words what the listener does; nothing while it is still starting."""
        if self._database_trouble is not None:
            return f"waiting: {self._database_trouble}"
        if self._reading is not None:
            waits = self._reading.reasons()
            return f"waiting: {waits[0]}" if waits else f"reading, {self._choice.delivery} delivery"
        if self._standing_by and self._newer is None:
            return STANDING_BY
        waiting = self._newer or self._reread_reason
        return f"waiting: {waiting}" if waiting else ""

    async def serves(self) -> tuple[bool, list[str]]:
        """Tell whether the listener does its part: as `ready`, but to stand by is a part, too."""
        ready, reasons = await self.ready()
        return (True, []) if reasons == [STANDING_BY] else (ready, reasons)

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell whether every commit from now on will be delivered, and if not, why not."""
        reasons = [] if self._database_trouble is None else [self._database_trouble]
        if self._reading is not None:
            reasons += self._reading.reasons()
        elif not reasons:
            waiting = self._newer or (STANDING_BY if self._standing_by else self._reread_reason)
            reasons = [waiting or "starting"]
        return not reasons, reasons

    def read_to(self) -> int | None:
        """Tell the LSN below which every commit is in its lanes; None in plain delivery and at the start."""
        return self._reading.read_to() if self._reading else None

    async def queued(self) -> int:
        """Count the entries that are in lanes and not yet applied."""
        journal = self._reading.journal if self._reading else None
        return (await journal.backlog()).entries if journal else 0

    def notes(self) -> list[str]:
        """Tell what is no reason to be unready: which delivery it is and why, and what has happened to it."""
        chosen = f"{self._choice.delivery} delivery: {self._choice.reason}"
        return [chosen, *(self._reading.notes() if self._reading else [])]

    async def status(self) -> dict[str, Any]:
        """Tell everything that `/status` shows."""
        state = await self._state()
        for name, count in (self._reading.filtered() if self._reading else {}).items():
            state["handlers"][name]["filtered"] += count
            state["handlers"][name]["read"] += count
        return state

    async def samples(self) -> list[telemetry.Sample]:
        """Tell everything that `/metrics` shows."""
        ready, _ = await self.ready()
        reading, state = self._reading, None
        if reading is not None:
            try:
                # Counted as in Postgres alone: a counter that goes back looks like one that began anew.
                state = await self._state()
            except Exception as error:
                if not is_away(error):
                    raise
        settings = self._ground.settings
        facts = telemetry.ListenerFacts(
            ready=ready,
            leads=reading is not None,
            rereads=self._rereads,
            connections=self._connections + (reading.realtime().connections if reading else 0),
            limits=(settings.max_backlog, settings.max_backlog_bytes),
        )
        return telemetry.of_listener(facts, state)

    async def _state(self) -> dict[str, Any]:
        """Tell the state, with what is filtered only as far as that is noted in Postgres."""
        ready, reasons = await self.ready()
        state = await status.read(self._engine, self._lanes)
        reading = self._reading
        health = reading.realtime() if reading else _NO_REALTIME
        missed, extra = (reading.compared() if reading else None) or (None, None)
        return state | {
            "delivery": self._choice.delivery,
            "reason": self._choice.reason,
            "ready": ready,
            "reasons": reasons,
            "slot": reading.slot() if reading else None,
            "limits": {
                "entries": self._ground.settings.max_backlog,
                "bytes": self._ground.settings.max_backlog_bytes,
            },
            "realtime": {
                "connected": health.connected,
                "subscribed": health.subscribed,
                "missed": missed,
                "extra": extra,
                "lag_seconds": health.lag_seconds,
                "canary_seconds": health.canary_seconds,
            },
        }


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    """Give one of the errors of a group, however deep."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
