"""Plain delivery: Realtime's payloads, or those of webhooks, go into the lanes.

Redis holds the only copy of what is under way, so its lanes outlive the listener: a new one takes them over.
What Realtime, the listener or Redis may have lost is recorded as a gap.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import datetime

import structlog
from sqlalchemy import text

from worker import gaps, lease, positions
from worker.backfill import Backfills
from worker.change import Position, RawChange
from worker.database import singly
from worker.hooks import HookSource, Inbox
from worker.lane_writer import LaneWriter
from worker.reading import layout, record
from worker.reading.ground import Ground, backfill
from worker.reading.intake import FLUSH, Intake
from worker.reading.journal import Clock, Journal
from worker.source import Gap, PlainSource, SourceHealth
from worker.wal.slot import drop_slot, terminate_holder

log = structlog.get_logger(__name__)

REALTIME_SLOTS = "supabase\\_realtime\\_replication\\_slot%"
_SERVER = text(
    "select pg_postmaster_start_time(), coalesce((select string_agg(slot_name || ' ' || active_pid, ',')"
    " from pg_replication_slots where temporary and database = current_database()"
    " and slot_name like :slots), '')"
)


class PlainReading:
    """Reads Realtime under one lease."""

    def __init__(self, ground: Ground, token: str) -> None:
        self._ground = ground
        self._token = token
        self._source = self._make_source()
        self.journal: Journal | None = None
        self.lanes = 0
        self._intake: Intake
        self._backfills: Backfills
        self._owed_since: datetime | None = None
        self._sure: datetime | None = None
        self._server: tuple[str, str] | None = None
        """When Postgres started, and who reads from Realtime's slot; as the last canary found it."""
        self._holding = False
        """True while a batch has left the source and is not yet in the lanes."""

    def _make_source(self) -> PlainSource:
        """Make what sends the payloads: Realtime, or the database's webhooks."""
        ground, settings = self._ground, self._ground.settings
        if settings.delivery != "webhooks":
            return ground.realtime(self._write_canary)
        return HookSource(Inbox(ground.lanes.redis, settings.queue, settings.max_backlog), ground.catalogue)

    async def begin(self) -> None:
        """Take over the generation, or begin one; bring handlers and lanes into line with what is loaded."""
        ground = self._ground
        async with ground.engine.begin() as connection:
            source = await positions.read_source(connection)
            greatest = await positions.greatest(connection)
            self._owed_since = await lease.live_since(connection)
        if source.delivery != "plain":
            await self._leave_the_log()
            source = source._replace(generation=None, floor=Position.ZERO)
            greatest = Position.ZERO
        writer, settled = await self._find_generation(source.generation, source.floor)
        last = writer.last if writer is not None else Position.ZERO
        clock = Clock(max(greatest, source.floor, last))
        present = clock.next()
        fresh = writer is None
        if writer is None:
            writer = LaneWriter(ground.lanes, lease.new_name(), self._token, present)
            await ground.in_redis(writer.begin)
        async with ground.engine.begin() as connection:
            self.lanes = await layout.agree(
                connection,
                ground.handlers,
                ground.settings.lanes,
                present,
                resumed=present,
                settled=settled,
            )
            floor = present if fresh else source.floor
            await lease.set_generation(connection, self._token, writer.generation, floor)
            if fresh and source.generation is not None:
                cause = "Redis had lost the lanes when the listener started"
                await gaps.record(connection, cause=cause, tables=ground.tables, since=self._owed_since)
                log.error("gap", cause=cause, tables=len(ground.tables))
        self.journal = Journal(
            engine=ground.engine,
            lanes=ground.lanes,
            writer=writer,
            token=self._token,
            clock=clock,
            tables=ground.tables,
            lane_count=self.lanes,
            enqueue=ground.enqueue,
            traces=ground.traces,
        )
        self._intake = Intake(ground, self.journal, self.lanes, self._token, Position.ZERO)
        self._backfills = self._intake.backfills("json")

    async def _write_canary(self) -> str:
        """Write a canary, and see whether Realtime can still have every change.

        Its slot is temporary: it goes with its backend and with the server, and a restart between two
        canaries leaves no other trace.
        """
        token = await self._ground.write_canary()
        async with singly(self._ground.engine) as connection:
            row = (await connection.execute(_SERVER, {"slots": REALTIME_SLOTS})).one()
        started, slots = str(row[0]), str(row[1])
        before, self._server = self._server, (started, slots)
        if before is None:
            return token
        restarted = before[0] != started
        # No slot before, and one now: Realtime makes it for its first subscriber.
        if not restarted and before[1] in ("", slots):
            return token
        what = "Postgres was restarted" if restarted else "Realtime reads by another backend"
        self._source.doubt(f"{what}: its temporary slot is gone, and what it had not sent")
        return token

    async def _leave_the_log(self) -> None:
        """Give up proven delivery: its slot would keep the log for ever, and its positions are others."""
        ground = self._ground
        cause = "the delivery was changed from proven to plain"
        async with ground.engine.begin() as connection:
            await record.forget(connection)
            await gaps.record(connection, cause=cause, tables=ground.tables, since=self._owed_since)
        log.error("gap", cause=cause, tables=len(ground.tables))
        async with ground.engine.connect() as connection:
            await terminate_holder(connection, ground.settings.slot)
            await drop_slot(connection, ground.settings.slot)

    async def _find_generation(
        self, generation: str | None, floor: Position
    ) -> tuple[LaneWriter | None, bool]:
        """Take over the generation that Postgres names, where Redis still has it.

        Returns its writer, or None; and whether nothing is under way.
        """
        if generation is None:
            return None, True
        ground = self._ground
        writer = LaneWriter(ground.lanes, generation, self._token, floor)
        if not await ground.in_redis(writer.take_over):
            return None, True
        names = {handler.name for handler in ground.handlers}
        await ground.in_redis(lambda: writer.forget_all_but(names))
        backlog = await ground.in_redis(writer.backlog)
        return writer, backlog.entries == 0

    async def run(self) -> None:
        """Read and backfill for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read(), name="listener: read")
            group.create_task(backfill(self._backfills), name="listener: backfill")

    async def _read(self) -> None:
        if self.journal is None:
            raise RuntimeError("begin() comes first")
        async with aclosing(self._source.read()) as batches:  # type: ignore[type-var] # it is an async generator
            async for batch in batches:
                with self._ground.pulse.working("taking in a batch of Realtime's changes"):
                    await self._take_in(batch, self.journal)

    async def _take_in(self, batch: Sequence[RawChange | Gap], journal: Journal) -> None:
        intake, source = self._intake, self._source
        at = time.time()
        self._holding = True
        await intake.until_room()
        staged = 0
        for one in batch:
            if isinstance(one, Gap):
                await journal.flush()
                await self._ground.record(one)
                continue
            if intake.is_strange(one):
                await intake.acquaint(one)
            staged += intake.take(one, at)
            if staged >= FLUSH:
                await journal.flush()
                staged = 0
        # Taken before the flush: what arrives during it is not written yet.
        sure = source.sure_until if source.waiting == 0 else None
        await journal.flush()
        self._sure = sure or self._sure
        self._holding = False

    async def tick(self) -> None:
        """Pay what is owed: gaps, counters, and the gap from before the start."""
        await self._ground.schema.look()
        await self._intake.pay()
        await self._intake.look_after()
        since = self._source.subscribed_since
        if self._owed_since is not None and since is not None:
            cause = "the listener was not running"
            await self._ground.record(Gap(self._owed_since, since, cause, self._ground.tables))
            self._owed_since = None
            self._backfills.ask()
        if self.journal is not None:
            await self.journal.check()
            await self.journal.sweep()

    def sure_until(self) -> datetime | None:
        """Up to when everything that was committed is in the lanes.

        Realtime may be sure of more than that: what it has handed over may still wait to be written.
        """
        if not self._holding and self._source.waiting == 0:
            self._sure = self._source.sure_until or self._sure
        # Until the gap from before the start is recorded, its beginning must not be forgotten.
        return None if self._owed_since is not None else self._sure

    def slot(self) -> None:
        """There is none in plain delivery."""
        return

    def realtime(self) -> SourceHealth:
        """Tell the state of Realtime."""
        return self._source.health()

    def reasons(self) -> list[str]:
        """Tell why not every commit from now on will be delivered."""
        trouble = self.journal.trouble if self.journal is not None else "starting"
        return [*([trouble] if trouble is not None else []), *self._source.health().reasons]

    def notes(self) -> list[str]:
        """There is nothing to note."""
        return []

    def read_to(self) -> None:
        """Nobody knows: Realtime's changes have no positions."""
        return

    def compared(self) -> None:
        """There is nothing to compare with."""
        return

    def filtered(self) -> Mapping[str, int]:
        """Count the changes that were filtered out and are not yet noted in Postgres, by handler."""
        return self._intake.filtered
