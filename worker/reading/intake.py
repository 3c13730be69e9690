"""From the source into the journal: routes, counts what is filtered, stops while the lanes are full."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import structlog
from redis.exceptions import RedisError
from sqlalchemy import text

from worker.change import RawChange
from worker.lanes import Backlog
from worker.reading.ground import CANARY, Ground
from worker.reading.journal import Journal
from worker.registry import Handler
from worker.routing import Router
from worker.source import Gap

log = structlog.get_logger(__name__)

FULL_SECONDS = 0.1
LOOK_CHANGES = 100
LOOK_BYTES = 4 * 1024 * 1024
"""The backlog is looked at again after so much: its bounds are as exact as that."""


class Intake:
    """Takes changes in for a reading."""

    def __init__(self, ground: Ground, journal: Journal, lanes: int) -> None:
        self._ground = ground
        self._journal = journal
        self._router = Router(ground.handlers, ground.catalogue, lanes)
        self._owed: dict[tuple[str, tuple[str, str]], Gap] = {}
        self._changes = LOOK_CHANGES
        self._bytes = 0
        self.filtered: Counter[str] = Counter()
        """Not yet noted in Postgres."""

    def take(self, raw: RawChange, at: float) -> int:
        """Take in a change; returns for how many handlers it was written down.

        A TRUNCATE names no key: a derive handler's answer to it is the backfill that a gap asks for.
        """
        if (raw.schema, raw.table) == CANARY:
            return 0
        routes = self._router.route(raw)
        for handler in routes.filtered:
            self.filtered[handler.name] += 1
        for handler, reason in routes.unroutable:
            self._cannot_route(raw, handler, reason)
        matched = routes.matched
        if raw.type == "TRUNCATE":
            for one in [one for one in matched if one.handler.kind == "derive"]:
                self._cannot_route(raw, one.handler, "TRUNCATE")
                matched.remove(one)
        if matched:
            self._journal.add(raw, matched, at)
            self._changes += len(matched)
            self._bytes += len(raw.payload) * len(matched)
        return len(matched)

    def _cannot_route(self, raw: RawChange, handler: Handler, reason: str) -> None:
        """Owe a gap for what a handler cannot be given; one for each handler, table and tick."""
        now = datetime.now(UTC)
        table = (raw.schema, raw.table)
        since, cause = now, f"a change could not be routed to {handler.name}: {reason}"
        if (handler.name, table) in self._owed:
            since = self._owed[handler.name, table].since or now
        else:
            name = f"{raw.schema}.{raw.table}"
            log.error("change cannot be routed", handler=handler.name, table=name, reason=reason)
        self._owed[handler.name, table] = Gap(since, now, cause, (table,))

    async def pay(self) -> None:
        """Record the gaps that are owed, and note what was filtered."""
        for name, gap in list(self._owed.items()):
            await self._ground.record(gap)
            if self._owed.get(name) is gap:  # one that has grown meanwhile is owed again
                del self._owed[name]
        if not self.filtered:
            return
        counts, self.filtered = self.filtered, Counter()
        try:
            async with self._ground.engine.begin() as connection:
                for handler, count in counts.items():
                    await connection.execute(
                        text("update tailrace.handlers set filtered = filtered + :count where name = :name"),
                        {"name": handler, "count": count},
                    )
        except BaseException:
            self.filtered.update(counts)
            raise

    async def until_room(self) -> None:
        """Wait while the lanes are full: the source holds the rest."""
        if self._changes < LOOK_CHANGES and self._bytes < LOOK_BYTES:
            return
        told = False
        while True:
            self._changes = self._bytes = 0
            try:
                backlog = await self._journal.backlog()
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
        settings = self._ground.settings
        return backlog.entries < settings.max_backlog and backlog.size < settings.max_backlog_bytes

    async def put_keys(self, handler: Handler, keys: Sequence[bytes]) -> None:
        """Write a backfill's keys; live changes go first."""
        if not keys:
            return
        while (await self._journal.backlog()).entries > self._ground.settings.max_backlog // 2:  # noqa: ASYNC110 - Redis sends no event
            await asyncio.sleep(FULL_SECONDS)
        await self._journal.put_keys(handler, keys)
