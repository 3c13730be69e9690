"""From the source into the journal: routes, counts what is filtered, stops while the lanes are full.

What is filtered out, or is a gap, has no entry in any lane whose position could tell that it is accounted
for. So it has a position of its own in the row of the source, up to which it is noted: a log that is read
again counts nothing twice.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import structlog
from redis.exceptions import RedisError
from sqlalchemy import text

from worker import following, gaps, lease
from worker.backfill import Backfills
from worker.change import Given, Position, RawChange
from worker.lanes import Backlog, LeaseLostError
from worker.paging import Givers, Pages
from worker.pulse import beat
from worker.reading.ground import CANARY, Ground
from worker.reading.journal import Journal
from worker.reading.lagging import Bounds, to_park
from worker.registry import Handler
from worker.routing import Router, Routes
from worker.source import Gap

log = structlog.get_logger(__name__)

FULL_SECONDS = 0.1
_NOTE = lease.limited(
    "update tailrace.source set noted_lsn = :lsn, noted_ordinal = :ordinal"
    " where lease_token = :token returning"
)
_FILTERED = text("update tailrace.handlers set filtered = filtered + :count where name = :name")

FLUSH = 500
"""Changes in one script call: more would hold up Redis for everybody."""
LOOK_CHANGES = 100
LOOK_BYTES = 4 * 1024 * 1024
"""The backlog is looked at again after so much: its bounds are as exact as that."""


class Intake:
    """Takes changes in for a reading."""

    def __init__(self, ground: Ground, journal: Journal, lanes: int, token: str, noted: Position) -> None:
        self._ground = ground
        self._journal = journal
        self._token = token
        self._router = Router(ground.handlers, ground.catalogue, lanes)
        self.is_strange = self._router.is_strange
        """Whether `acquaint` comes before `take`: a question asked of every change."""
        self._said: dict[tuple[str, tuple[str, str]], str] = {}
        self._said_at = ground.catalogue.version
        settings = ground.settings
        self._bounds = Bounds(
            settings.max_backlog, settings.max_backlog_bytes, settings.lane_backlog, len(ground.handlers)
        )
        self._noted = self._taken = noted
        self._givers = Givers(ground.engine)
        self._owed: dict[tuple[str, tuple[str, str]], Gap] = {}
        self._changes = LOOK_CHANGES
        self._bytes = 0
        self.filtered: Counter[str] = Counter()
        """Not yet noted in Postgres."""

    async def acquaint(self, raw: RawChange) -> None:
        """Have the catalogue read again for a change that was written under a schema it does not show."""
        await self._journal.flush()
        await self._ground.in_postgres(lambda: self._ground.schema.read_after(raw.xid))
        self._router.acquaint(raw)

    async def is_given(self, given: Given) -> bool:
        """Tell whether a row was written into the log by the backfill that it names."""
        return await self._ground.in_postgres(lambda: self._givers.have_given(given))

    def take(self, raw: RawChange, at: float) -> int:
        """Take in a change; returns for how many handlers it was written down."""
        if (raw.schema, raw.table) == CANARY:
            return 0
        routes = self._router.route(raw)
        matched = routes.matched
        if raw.position is None or raw.position > self._noted:
            self._note(raw, routes)
        if matched:
            self._journal.add(raw, matched, at)
            self._changes += len(matched)
            self._bytes += len(raw.payload) * len(matched)
        return len(matched)

    def _note(self, raw: RawChange, routes: Routes) -> None:
        """Note what has no entry in any lane."""
        self._taken = raw.position or self._taken
        for handler in routes.filtered:
            self.filtered[handler.name] += 1
        if routes.filtered and self._journal.follows:
            following.filtered(raw, [handler.name for handler in routes.filtered])
        table = routes.followed_as or (raw.schema, raw.table)
        for handler, reason in routes.unroutable:
            self._cannot_route(table, handler, reason)

    def _cannot_route(self, table: tuple[str, str], handler: Handler, reason: str) -> None:
        """Owe a gap for what a handler cannot be given; one for each handler, table and tick."""
        now = datetime.now(UTC)
        since, cause = now, f"a change could not be routed to {handler.name}: {reason}"
        if (handler.name, table) in self._owed:
            since = self._owed[handler.name, table].since or now
        self._owed[handler.name, table] = Gap(since, now, cause, (table,))
        if self._said_at != self._ground.catalogue.version:
            self._said, self._said_at = {}, self._ground.catalogue.version
        if self._said.get((handler.name, table)) != reason:  # once, however many changes and ticks
            self._said[handler.name, table] = reason
            log.error("change cannot be routed", handler=handler.name, table=".".join(table), reason=reason)

    async def pay(self) -> None:
        """Record the gaps that are owed and what was filtered, and up to where that is.

        Raises:
            LeaseLostError: another listener has taken over.
        """
        owed, counts, taken = dict(self._owed), Counter(self.filtered), self._taken
        if not owed and not counts:
            return  # nothing to note is noted with what comes next: our own writes must not keep the log busy
        async with self._ground.engine.begin() as connection:
            at = {"token": self._token, "lsn": taken.lsn, "ordinal": taken.ordinal}
            if (await connection.execute(_NOTE, at)).one_or_none() is None:
                raise LeaseLostError("another listener has taken over")
            new = [gap for gap in owed.values() if await gaps.widen(connection, gap)]
            for handler, count in sorted(counts.items()):
                await connection.execute(_FILTERED, {"name": handler, "count": count})
        self._noted = taken
        self.filtered -= counts
        for gap in new:
            tables = [f"{schema}.{table}" for schema, table in gap.tables]
            log.warning("gap", cause=gap.cause, tables=tables)
        for name, gap in owed.items():
            if self._owed.get(name) is gap:  # one that has grown meanwhile is owed again
                del self._owed[name]

    async def until_room(self) -> None:
        """Wait while the lanes are full: the source holds the rest."""
        if self._changes < LOOK_CHANGES and self._bytes < LOOK_BYTES:
            return
        told = False
        while True:
            self._changes = self._bytes = 0
            try:
                backlog = await self.look()
            except (RedisError, OSError):
                return  # the flush will wait for Redis, and says so
            if self._bounds.has_room(backlog):
                if told:
                    log.info("reading goes on")
                return
            if not told:
                log.warning("the lanes are full: reading stops", entries=backlog.entries, size=backlog.size)
                told = True
            beat()
            await asyncio.sleep(FULL_SECONDS)

    async def look_after(self) -> None:
        """Have lanes parked also while nothing comes in; a Redis that is away is the flush's to tell."""
        with contextlib.suppress(RedisError, OSError):
            await self.look()

    async def look(self) -> Backlog:
        """Count what is under way, and have the lanes parked that lag too far behind."""
        return await self._journal.park(lambda backlogs, tops: to_park(backlogs, tops, self._bounds))

    def backfills(self, form: Literal["json", "text"], pages: Pages | None = None) -> Backfills:
        """Make the backfills whose keys go into the same lanes.

        Args:
            form: how the source writes values.
            pages: where change handlers have their rows written, if the source brings them from there.
        """
        ground = self._ground
        return Backfills(
            ground.engine,
            ground.handlers,
            ground.catalogue,
            self.put_keys,
            self._journal.until_passed,
            form=form,
            pages=pages,
        )

    async def put_keys(self, handler: Handler, keys: Sequence[bytes]) -> None:
        """Write a backfill's keys; live changes go first."""
        if keys:
            await self.until_quiet()
            await self._journal.put_keys(handler, keys)

    async def until_quiet(self) -> None:
        """Wait while live changes fill the lanes."""
        while (await self._journal.backlog()).entries > self._ground.settings.max_backlog // 2:  # noqa: ASYNC110 - Redis sends no event
            await asyncio.sleep(FULL_SECONDS)
