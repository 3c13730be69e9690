"""The listener's pen: from routed changes to entries in the lanes, whatever Redis does meanwhile.

It gives changes their positions (in plain delivery the source has none), keeps what is not yet surely in
Redis, and begins a new generation when Redis has lost the old one. What reads it is in worker.draining.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import structlog
from redis.exceptions import RedisError, ResponseError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import following, gaps, lease, payloads
from worker.change import Position, RawChange
from worker.database import explain, is_away
from worker.lane_writer import LaneWriter
from worker.lanes import NOTHING, Backlog, Content, Lane, Lanes, LanesLostError, Top
from worker.pulse import beat
from worker.queue import is_full, refuses_for_now
from worker.registry import Handler
from worker.routing import Routed, lane_of
from worker.source import RereadError

if TYPE_CHECKING:
    from worker.tracing.spans import Traces

log = structlog.get_logger(__name__)

AWAY_SECONDS = 0.2
MOST_AWAY_SECONDS = 5.0
BEHIND = 2**40
"""Ordinals of what is put behind a transaction: more than any transaction has changes."""
MOST_AT_ONCE = 1_000
"""Changes in one script call; see FLUSH in listener.py."""
LARGE_BYTES = 1 << 20
"""A payload that is larger goes to Postgres at once. What Realtime sends never is."""
SPARED_BYTES = 1 << 10
"""While Redis is full, so does one that is larger than this: without it the entry may find room."""


class Clock:
    """Positions of plain delivery: milliseconds and a number within them, always rising.

    They come from this process and not from Redis, so that neither a flushed Redis nor one whose clock is
    behind can give a change a position that its lane has passed.
    """

    def __init__(self, after: Position) -> None:
        self._last = after

    def next(self) -> Position:
        """Give the next position."""
        now = time.time_ns() // 1_000_000
        last = self._last
        self._last = Position(now, 0) if now > last.lsn else Position(last.lsn, last.ordinal + 1)
        return self._last


class Pending(NamedTuple):
    """A routed change, or keys to be computed, not yet surely in Redis."""

    position: Position
    handler: Handler
    keys: tuple[bytes, ...]
    lanes: tuple[int, ...]
    source: str
    payload: bytes
    at: float
    xid: int | None = None


class Journal:
    """Writes the lanes of the generation in force."""

    def __init__(  # noqa: PLR0913 - what a reading has, under names
        self,
        *,
        engine: AsyncEngine,
        lanes: Lanes,
        writer: LaneWriter,
        token: str,
        clock: Clock | None,
        tables: Sequence[tuple[str, str]],
        lane_count: int,
        enqueue: Callable[[Lane], Awaitable[None]],
        traces: "Traces | None" = None,
    ) -> None:
        self._engine = engine
        self._rereads = clock is None
        """The source gives positions, and what Redis loses can be read again from it; else it is a gap."""
        self._commit = self._behinds = self._passed_before = 0
        self._outside = asyncio.Event()
        if clock is not None:
            self._outside.set()
        self._lanes = lanes
        self._writer = writer
        self._token = token
        self._clock = clock or Clock(Position.ZERO)
        self._tables = tables
        self._lane_count = lane_count
        self._enqueue = enqueue
        self._lock = asyncio.Lock()
        self._pending: list[Pending] = []
        self._batch = 0
        """How many of the pending are in the batch whose fate is open: it must not grow until it is known."""
        self._clean_at = datetime.now(UTC)
        self.follows = following.follows()
        self._traces = traces
        self._traced: dict[Position, tuple[RawChange, float]] = {}
        """Changes that are traced and not surely in Redis, and since when the listener has them."""
        self._large = LARGE_BYTES
        self._stored: set[tuple[str, Position]] = set()
        """Handlers and positions of the batch's payloads that are in Postgres."""
        self._sweeps = True
        """There may be payloads in Postgres that are needed no more; at first those of another listener."""
        self.trouble: str | None = None
        """Why nothing can be written just now; None while all is well."""
        self.written = 0

    @property
    def generation(self) -> str:
        """The generation in force."""
        return self._writer.generation

    # Taking in

    def add(self, raw: RawChange, routed: Sequence[Routed], at: float) -> None:
        """Take in a change; `flush` writes it."""
        position = raw.position or self._clock.next()
        if self._traces is not None and self._traces.wants(position):
            self._traced[position] = (raw, at)
        if self.follows:
            following.read(position, raw, {one.handler.name: one.lanes for one in routed})
        self._pending += [
            Pending(position, one.handler, one.keys, one.lanes, raw.source, raw.payload, at, raw.xid)
            for one in routed
        ]

    def inside(self, position: Position) -> None:
        """Note that a transaction of the log is being taken in, up to this change."""
        self._commit = position.lsn
        self._outside.clear()

    def passed_before(self, lsn: int) -> None:
        """Note up to where lanes may be at the start of a reading: they may be ahead of it for long."""
        self._passed_before = lsn

    def outside(self) -> None:
        """Note that the last transaction is wholly written."""
        # Keys put behind a transaction that a lane has passed would stand below its position, and be lost.
        if self._commit >= self._passed_before:
            self._outside.set()

    async def put_keys(self, handler: Handler, keys: Sequence[bytes]) -> None:
        """Write keys that a derive handler is to compute, whatever changed."""
        at = time.time()
        numbers = tuple(lane_of(handler.name, key, self._lane_count) for key in keys)
        while True:
            await self._outside.wait()
            async with self._lock:
                if not self._outside.is_set():
                    continue
                position = self._behind() if self._rereads else self._clock.next()
                self._pending.append(Pending(position, handler, tuple(keys), numbers, "backfill", b"", at))
                await self._write()
                return

    def _behind(self) -> Position:
        """Give a position behind the last transaction of the log and before any that may come."""
        self._behinds += 1
        return Position(self._commit, BEHIND + self._behinds)

    async def flush(self) -> None:
        """Write what was taken in. Waits for Redis as long as it takes.

        Raises:
            LeaseLostError: another listener has taken over.
        """
        async with self._lock:
            await self._write()

    async def _write(self) -> None:
        delay, renewed = AWAY_SECONDS, False
        while self._pending:
            # Changes are added while a flush waits for Redis: they belong to the next batch.
            self._batch = self._batch or self._next_batch()
            await self._store()
            self._stage()
            try:
                cold = await self._writer.flush()
                self._settle()
                for lane in cold:
                    await self._enqueue(lane)
            except LanesLostError as lost:
                await self._begin_generation(str(lost))
            except ResponseError as error:
                if is_full(error) and self._spare():
                    continue
                if refuses_for_now(error) or renewed:
                    delay = await self._away(error, delay)
                else:
                    await self._begin_generation(f"Redis refused an entry ({type(error).__name__})")
                    renewed = True  # what is refused there too is not the fault of the lanes
            except (RedisError, OSError) as error:
                delay = await self._away(error, delay)

    def _next_batch(self) -> int:
        """Count off a batch; what has one position stays together, for a batch is known by its last one."""
        pending, size = self._pending, min(len(self._pending), MOST_AT_ONCE)
        while size < len(pending) and pending[size].position == pending[size - 1].position:
            size += 1
        return size

    async def _store(self) -> None:
        """Put large payloads of the batch into Postgres, before anybody can find their entries."""
        found = [
            payloads.Stored(one.handler.name, tuple(sorted(set(one.lanes))), one.position, one.payload)
            for one in self._too_large()
        ]
        if found:
            await self._in_postgres(lambda: payloads.put(self._engine, self.generation, found))
            self._stored.update((one.handler, one.position) for one in found)
            self._sweeps = True

    def _spare(self) -> bool:
        """Find out whether a full Redis can be spared payloads that are in the batch still."""
        spared, self._large = self._large > SPARED_BYTES, min(self._large, SPARED_BYTES)
        return spared and bool(self._too_large())

    def _too_large(self) -> list[Pending]:
        """List what has a payload in the batch that is to be in Postgres; keys have none."""
        return [
            one
            for one in self._pending[: self._batch]
            if len(one.payload) > self._large
            and one.handler.kind == "change"
            and (one.handler.name, one.position) not in self._stored
        ]

    def _stage(self) -> None:
        """Turn what is pending into entries; again after a change of generation, for they name each other."""
        self._writer.unstage()
        for one in self._pending[: self._batch]:
            stage = self._stage_keys if one.handler.kind == "derive" else self._stage_change
            stage(one)

    def _stage_keys(self, one: Pending) -> None:
        """Give each lane of a derive handler the keys that are its own; the first counts the change."""
        counted = 0
        for number in dict.fromkeys(one.lanes):
            keys = tuple(
                key for key, lane in zip(one.keys, one.lanes, strict=bool(one.keys)) if lane == number
            )
            changes = 0 if counted or one.source == "backfill" else 1
            counted += changes
            content = Content((number,), keys, one.source, b"", one.at, one.xid, changes)
            self._writer.stage(Lane(one.handler.name, number), one.position, content)

    def _stage_change(self, one: Pending) -> None:
        """Put a change into every lane it belongs to, under one id."""
        numbers = tuple(sorted(set(one.lanes)))
        content = Content(numbers, one.keys, one.source, one.payload, one.at, one.xid)
        if (one.handler.name, one.position) in self._stored:
            content = content._replace(payload=b"", stored=len(one.payload))
        for number in numbers:
            self._writer.stage(Lane(one.handler.name, number), one.position, content)
            content = content._replace(changes=0)  # the lowest lane applies it, and counts it

    def _settle(self) -> None:
        beat()
        if self.follows:
            following.written((one.position for one in self._pending[: self._batch]), self.generation)
        if self._traces is not None and self._traced:
            for position in dict.fromkeys(one.position for one in self._pending[: self._batch]):
                if (known := self._traced.pop(position, None)) is not None:
                    self._traces.written(position, *known)
        self.written += self._batch
        del self._pending[: self._batch]
        self._batch = 0
        self._large = LARGE_BYTES
        self._stored.clear()
        if self.trouble is not None:
            log.info("Redis is back")
            self.trouble = None

    async def _away(self, error: Exception, delay: float) -> float:
        if self.trouble is None:
            log.warning("waiting for Redis", error_class=type(error).__name__)
        self.trouble = f"Redis cannot be written ({type(error).__name__}): check REDIS_URL and its memory"
        beat()
        await asyncio.sleep(delay)
        return min(delay * 2, MOST_AWAY_SECONDS)

    # Looking after the generation

    async def check(self) -> None:
        """See whether Redis still has all that was written; begin a new generation where it has not.

        Raises:
            LeaseLostError: another listener has taken over.
        """
        if self._lock.locked():
            return  # a flush is under way, and finds out by itself; it may wait for Redis for long
        async with self._lock:
            try:
                await self._writer.check()
                await self._check_tails()
            except LanesLostError as lost:
                await self._begin_generation(str(lost))
            except (RedisError, OSError) as error:
                if self.trouble is None:
                    log.warning("waiting for Redis", error_class=type(error).__name__)
                self.trouble = f"Redis cannot be reached ({type(error).__name__}): check REDIS_URL"
                return
            if not self._pending:
                self._settle()

    async def _check_tails(self) -> None:
        """Find a lane whose last entries have vanished with nothing after them to show it.

        Looks at the stream first and then at the position: an entry that was applied in between is no loss.
        """
        passed = await self._lanes.passed(self.generation)
        waiting: list[tuple[Lane, Top]] = []
        for lane, top in self._writer.tops.items():
            if top.entries > passed.get(lane, NOTHING).entries:
                waiting.append((lane, top))
        if not waiting:
            self._clean_at = datetime.now(UTC)
            return
        missing = await self._lanes.missing(self.generation, [(lane, top.last) for lane, top in waiting])
        if not missing:
            return
        async with self._engine.connect() as connection:
            for lane, last in missing:
                row = (
                    await connection.execute(
                        text(
                            "select lsn, ordinal from tailrace.lanes"
                            " where handler = :handler and lane = :lane"
                        ),
                        {"handler": lane.handler, "lane": lane.number},
                    )
                ).one_or_none()
                if row is not None and Position(row[0], row[1]) < Position.parse(last):
                    raise LanesLostError("Redis has lost the end of a lane")

    async def _begin_generation(self, cause: str) -> None:
        """Go on under a new name, and record what the old lanes may have held as a gap.

        Raises:
            RereadError: no gap is needed, the source has it all.
        """
        if self._rereads:
            raise RereadError(cause)
        old = self._writer.generation
        # What is pending keeps its positions: a batch of unknown fate may have been applied from the old
        # lanes, and only its positions tell so. The floor is the last position before it.
        floor = self._writer.last
        writer = LaneWriter(self._lanes, lease.new_name(), self._token, floor)
        try:
            await writer.begin()
        except (RedisError, OSError) as error:
            await self._away(error, AWAY_SECONDS)
            return
        await self._in_postgres(lambda: self._put_in_force(writer, floor, cause))
        log.error("gap", cause=cause, tables=len(self._tables))
        self._writer = writer
        self._stored.clear()  # they are kept under the generation's name
        try:
            await writer.retire(old)
        except (RedisError, OSError):
            log.warning("the lanes of the old generation stay in Redis", generation=old)

    async def _put_in_force(self, writer: LaneWriter, floor: Position, cause: str) -> None:
        async with self._engine.begin() as connection:
            await lease.set_generation(connection, self._token, writer.generation, floor)
            await gaps.record(connection, cause=cause, tables=self._tables, since=self._clean_at)

    async def _in_postgres(self, step: Callable[[], Awaitable[None]]) -> None:
        """Do a step in Postgres, waiting for Postgres as long as it takes."""
        while True:
            try:
                return await step()
            except Exception as error:
                if not is_away(error):
                    raise
                log.warning("waiting for Postgres", reason=explain(error))
                beat()
                await asyncio.sleep(MOST_AWAY_SECONDS / 5)

    async def sweep(self) -> None:
        """Forget the payloads in Postgres that are needed no more."""
        if not self._sweeps:
            return  # own writes must not keep the log busy
        self._sweeps, left = False, True
        try:
            async with self._engine.begin() as connection:
                left = await payloads.sweep(connection, self._token)
        finally:
            self._sweeps = self._sweeps or left

    async def until_passed(self, handler: Handler) -> None:
        """Wait until all that is written for a handler by now is applied, or held.

        Or until the lanes have been lost: then whatever was in them is in a gap.
        """
        generation = self.generation
        goal = {lane: top.entries for lane, top in self._writer.tops.items() if lane.handler == handler.name}
        while generation == self.generation:
            passed = await self._lanes.passed(generation)
            if all(passed.get(lane, NOTHING).entries >= count for lane, count in goal.items()):
                return
            await asyncio.sleep(AWAY_SECONDS)

    async def backlog(self) -> Backlog:
        """Count what is written and not yet applied."""
        return await self._writer.backlog()

    async def park(
        self, choose: Callable[[Mapping[Lane, Backlog], Mapping[Lane, Top]], Mapping[Lane, int]]
    ) -> Backlog:
        """Have lanes parked as they are chosen by their backlogs; return what is under way altogether."""
        backlogs = await self._writer.backlogs()
        for lane in await self._lanes.park(self.generation, choose(backlogs, self._writer.tops)):
            await self._enqueue(lane)
        return sum(backlogs.values(), NOTHING)
