"""Proven delivery: the write-ahead log delivers, Realtime rings.

Redis holds nothing that cannot be read again, so every reading begins a generation of its own from where the
slot stands; the slot moves only past commits that every lane has passed in Postgres.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from worker import gaps, lease, positions
from worker.backfill import Backfills
from worker.change import Position
from worker.database import singly
from worker.lane_writer import LaneWriter
from worker.paging import Pages
from worker.reading import foothold, layout, reached, record
from worker.reading.doorbell import Doorbell
from worker.reading.ground import CANARY, Ground, backfill
from worker.reading.intake import FLUSH, Intake
from worker.reading.journal import Journal
from worker.reading.retention import endangered as endangered_slot
from worker.reading.slot_rule import slot_target
from worker.source import Gap, RereadError, SourceHealth
from worker.wal.failures import SlotLostError, SlotMissingError, WalError
from worker.wal.publication import Fingerprint, interrupted, read_fingerprint, returned, with_earlier_keys
from worker.wal.reader import Reader, Transport, choose_transport, open_reader
from worker.wal.slot import (
    Judgement,
    Server,
    SlotState,
    as_text,
    read_server,
    read_slot,
)
from worker.wal.transactions import WalBatch
from worker.wal.type_names import TypeNames

log = structlog.get_logger(__name__)

ADVANCE_SECONDS = 2.0
IDLE_ADVANCE_SECONDS = 30.0
"""How often the slot moves when nothing but our own writes happens: moving it is a write, too."""


class ProvenReading:
    """Reads the log under one lease, in one generation."""

    def __init__(self, ground: Ground, token: str) -> None:
        self._ground = ground
        self._token = token
        self._doorbell = Doorbell(ground, self._ring)
        self.journal: Journal | None = None
        self.lanes = 0
        self._writer: LaneWriter
        self._intake: Intake
        self._backfills: Backfills
        self._reader: Reader
        self._transport: Transport
        self._published: Fingerprint | None = None
        self._server: Server
        self._slot: SlotState | None = None
        self._read_to = self._reached = self._flushed = 0
        self._advanced = (0, 0.0)
        self._busy = False
        self._endangered = ""
        self._story = ""
        self._live = False

    # Beginning

    async def begin(self) -> None:
        """Find the slot or make it, judge what may have been missed, begin a generation where it stands.

        Raises:
            RereadError: it cannot begin now.
        """
        try:
            await self._begin()
        except WalError as error:
            raise RereadError(str(error), seconds=1.0) from error
        except DBAPIError as error:
            if (again := foothold.to_wait_for(error)) is None:
                raise
            raise again from error

    async def _begin(self) -> None:
        ground, settings = self._ground, self._ground.settings
        url = settings.database_url.get_secret_value()
        direct = settings.database_direct_url
        # Whoever has the lease now reads from the slot: without it we must not end that session.
        await lease.renew(ground.engine, self._token, None)
        self._transport = await choose_transport(url, direct.get_secret_value() if direct else None)
        start, server, judgement, remembered = await foothold.find(ground)
        async with ground.engine.connect() as connection:
            published = await read_fingerprint(connection, settings.publication)
            self._published = with_earlier_keys(remembered.published, published)
        self._server = server
        self._flushed = server.flushed
        await self._begin_generation(start, server, judgement, remembered)
        await self._mark_present()
        self._reader = await open_reader(
            self._transport,
            url=direct.get_secret_value() if direct else url,
            engine=ground.engine,
            slot=settings.slot,
            publication=settings.publication,
            names=TypeNames(ground.engine),
        )
        self._read_to = start
        self._advanced = (start, time.monotonic())

    async def _mark_present(self) -> None:
        """Write a commit for backfills to stand behind: it is beyond all that any lane has passed so far."""
        if self.journal is not None:
            async with self._ground.engine.connect() as connection:
                self.journal.passed_before((await read_server(connection)).flushed)
        # Before there is a reader to be closed.
        await self._doorbell.write_canary()

    async def _begin_generation(
        self, start: int, server: Server, judgement: Judgement, remembered: record.Remembered
    ) -> None:
        ground = self._ground
        floor = Position(start, -1)
        writer = LaneWriter(ground.lanes, lease.new_name(), self._token, floor)
        await ground.in_redis(writer.begin)
        switched = remembered.generation is not None and remembered.delivery != "proven"
        missed = judgement.finding != "fine" or switched
        cause = judgement.reason or "the delivery was changed from plain to proven"
        async with ground.engine.begin() as connection:
            since = await lease.live_since(connection)
            if missed:
                await record.restart_at(
                    connection,
                    start,
                    anew=switched or record.another_cluster(remembered, server),
                    new_history=judgement.finding == "history" or record.another_history(remembered, server),
                )
            greatest = await positions.greatest(connection)
            # All commits below the slot are passed by every lane; none is beyond it: nothing is under way.
            settled = greatest <= floor
            present = Position(max(start, server.flushed), -1)
            self.lanes = await layout.agree(
                connection,
                ground.handlers,
                ground.settings.lanes,
                present,
                # New lanes of a handler that is known go on where the slot stands, with all the others.
                resumed=floor,
                settled=settled,
            )
            await lease.set_generation(connection, self._token, writer.generation, floor)
            target = record.first_target(remembered, start) if judgement.finding == "fine" else start
            await record.begin(connection, self._token, target, server, self._published)
            await self._gaps_of_start(connection, cause if missed else None, remembered, since)
            noted = (await record.read(connection)).noted
        if remembered.generation is not None:
            await ground.in_redis(lambda: writer.retire(str(remembered.generation), keep=False))
        self._writer = writer
        self.journal = Journal(
            engine=ground.engine,
            lanes=ground.lanes,
            writer=writer,
            token=self._token,
            clock=None,
            tables=ground.tables,
            lane_count=self.lanes,
            enqueue=ground.enqueue,
            traces=ground.traces,
        )
        self._intake = Intake(ground, self.journal, self.lanes, self._token, noted)
        pages = Pages(
            ground.engine,
            ground.settings.publication,
            read_to=lambda: self._read_to,
            wake=self._ring,
            until_quiet=self._intake.until_quiet,
        )
        self._backfills = self._intake.backfills("text", pages)

    async def _gaps_of_start(
        self,
        connection: AsyncConnection,
        cause: str | None,
        remembered: record.Remembered,
        since: datetime | None,
    ) -> None:
        ours = set(self._ground.tables)
        if cause is not None:
            log.error("gap", cause=cause, tables=len(ours))
            self._story = f"gap at the start of this reading: {cause}"
            await gaps.record(connection, cause=cause, tables=sorted(ours), since=since)
            return
        changed = [table for table in interrupted(remembered.published, self._published) if table in ours]
        if changed:
            cause = "the publication was changed while nobody looked"
            log.error("gap", cause=cause, tables=len(changed))
            await gaps.record(connection, cause=cause, tables=changed, since=since)

    # Reading

    async def run(self) -> None:
        """Read, backfill and listen to Realtime for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(), name="listener: read")
                group.create_task(backfill(self._backfills), name="listener: backfill")
                group.create_task(self._doorbell.run(), name="listener: realtime")
        finally:
            self._live = False
            await self._reader.close()
            # The end of a server's log is often the last that is seen of that server.
            await self._note_reached(self._read_to)

    async def _read(self) -> None:
        if self.journal is None:
            raise RuntimeError("begin() comes first")
        try:
            async with aclosing(self._reader.read()) as batches:  # type: ignore[type-var] # it is an async generator
                self._live = True
                async for batch in batches:
                    with self._ground.pulse.working("taking in a batch of the log"):
                        await self._take_in(batch, self.journal)
        except (SlotLostError, SlotMissingError) as error:
            raise RereadError(str(error), seconds=1.0) from error
        except WalError as error:
            raise RereadError(str(error), seconds=0.5) from error

    async def _take_in(self, batch: WalBatch, journal: Journal) -> None:
        intake, doorbell = self._intake, self._doorbell
        at = time.time()
        await intake.until_room()
        staged = 0
        for position, raw in batch.changes:
            journal.inside(position)
            if raw.given is None:
                doorbell.logged(raw)
            elif not await intake.is_given(raw.given):
                continue
            if (raw.schema, raw.table) != CANARY:
                self._busy = True
                if intake.is_strange(raw):
                    await intake.acquaint(raw)
                staged += intake.take(raw, at)
            if staged >= FLUSH:
                await journal.flush()
                staged = 0
        await journal.flush()
        if not batch.open:
            journal.outside()
        # Only now: what is not wholly in the lanes must be read again.
        self._read_to = batch.read_to

    def _ring(self) -> None:
        self._reader.wake()

    # Looking after

    async def tick(self) -> None:
        """See that slot, server and publication are what they were; move the slot."""
        ground, settings = self._ground, self._ground.settings
        # Before what is owed is paid: the slot must pass no change whose gap is not recorded yet.
        read_to = self._read_to
        await ground.schema.look()
        await self._intake.pay()
        await self._intake.look_after()
        async with singly(ground.engine) as connection:
            server = await read_server(connection)
            self._flushed = server.flushed
            self._slot = await read_slot(connection, settings.slot)
            published = with_earlier_keys(
                self._published, await read_fingerprint(connection, settings.publication)
            )
            reread, recorded = (
                await connection.execute(text("select reread, slot_target from tailrace.source"))
            ).one()
        self._watch_retention()
        if (server.started_at, server.timeline) != (self._server.started_at, self._server.timeline):
            raise RereadError("Postgres was restarted")
        if reread is not None:
            raise RereadError(str(reread))
        if self._slot is None or self._slot.wal_status == "lost":
            raise RereadError("the replication slot is gone")
        if recorded is not None and self._slot.confirmed > recorded:
            # Nobody can while we stream. Our own next target would hide it from the next start.
            raise RereadError("the replication slot was moved by somebody else")
        await self._compare(published)
        if read_to != self._reached:
            await self._note_reached(read_to)
        await self._advance(read_to)
        if self.journal is not None:
            await self.journal.check()
            await self.journal.sweep()

    async def _note_reached(self, read_to: int) -> None:
        if await reached.note(self._ground.lanes, self._server.system_identifier, read_to):
            self._reached = read_to

    def _watch_retention(self) -> None:
        endangered = endangered_slot(self._slot) if self._slot is not None else ""
        if endangered and not self._endangered:
            log.warning(
                "the replication slot is in danger", slot=self._ground.settings.slot, reason=endangered
            )
        self._endangered = endangered

    async def _compare(self, published: Fingerprint | None) -> None:
        ours = set(self._ground.tables)
        changed: Sequence[tuple[str, str]] = [
            table for table in interrupted(self._published, published) if table in ours
        ]
        if changed:
            now = datetime.now(UTC)
            await self._ground.record(Gap(None, now, "the publication was changed", tuple(changed)))
            self._backfills.ask()
        back = returned(self._published, published, ours)
        if back:
            await self._ground.schema.look()  # the table may be another one by now
            cause = "the table was not in the publication for a while"
            await self._ground.record(Gap(None, datetime.now(UTC), cause, back))
            self._backfills.ask()
        if published != self._published:
            async with self._ground.engine.begin() as connection:
                await record.set_published(connection, self._token, published)
            self._published = published

    async def _advance(self, read_to: int) -> None:
        """Move the slot, having recorded where to; at most to what had been read so far."""
        # Before the positions: what is enqueued in between is not passed by them.
        last = {lane: Position.parse(top.last) for lane, top in self._writer.tops.items()}
        target = slot_target(last, await positions.of_all(self._ground.engine), read_to)
        moved, at = self._advanced
        due = ADVANCE_SECONDS if self._busy else IDLE_ADVANCE_SECONDS
        if target <= moved or time.monotonic() - at < due:
            return
        # Now, for more may be read while we wait; and a lane may lag, and pass soon.
        self._busy = target < read_to
        await record.set_target(self._ground.engine, self._token, target)
        try:
            await self._reader.advance(target)
        except WalError as error:
            raise RereadError(str(error)) from error
        self._advanced = (target, time.monotonic())

    # Telling

    def sure_until(self) -> datetime | None:
        """Up to when everything is accounted for: the slot holds the rest."""
        return datetime.now(UTC) if self._live else None

    def filtered(self) -> Mapping[str, int]:
        """Count the changes that were filtered out and are not yet noted in Postgres, by handler."""
        return self._intake.filtered

    def realtime(self) -> SourceHealth:
        """Tell the state of Realtime, which is no reason to be unready here."""
        return self._doorbell.health()

    def read_to(self) -> int:
        """Tell the LSN below which every commit is in its lanes."""
        return self._read_to

    def compared(self) -> tuple[int, int]:
        """Count what Realtime left out, and what it sent besides."""
        return self._doorbell.compared()

    def notes(self) -> list[str]:
        """Tell what is wrong with Realtime, and what has been lost before this reading."""
        return [*([self._story] if self._story else []), *self._doorbell.notes()]

    def reasons(self) -> list[str]:
        """Tell why not every commit from now on will be delivered."""
        trouble = self.journal.trouble if self.journal is not None else "starting"
        reading = [] if self._live else ["the replication slot is not being read yet"]
        endangered = [self._endangered] if self._endangered else []
        return [*([trouble] if trouble is not None else []), *reading, *endangered]

    def slot(self) -> dict[str, Any] | None:
        """Tell the state of the slot."""
        if self._slot is None:
            return None
        return {
            "name": self._slot.name,
            "wal_status": self._slot.wal_status,
            "retained_bytes": self._slot.retained_bytes,
            "confirmed_lsn": as_text(self._slot.confirmed),
            "transport": self._transport.kind,
            "safe_bytes": self._slot.safe_wal_size,
            "keep_size": self._slot.keep_size,
            "lag_seconds": self._doorbell.log_lag(),
            "lag_bytes": max(0, self._flushed - self._read_to),
        }
