"""One pass over one lane: one Postgres transaction that applies a batch and moves the lane's position.

The order of its steps is what makes it right, and is the same for every delivery: begin, limits, lock the
row without waiting, read position and generation, read the stream, drop what is applied, check the chain,
retry what is held and due, call the handler, move the position, commit, and only then trim the stream.
Which worker does it, and when, is not decided here (see draining.py).
"""

import enum
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker import gaps, held, meetings, positions
from worker.calls import Caller, CallFailedError, Isolation, LaneBlockedError, TransactionSpoiltError
from worker.change import Position
from worker.database import is_away, is_conflict, is_locked
from worker.held import HeldRow
from worker.items import Decoder, Item, KeyItem
from worker.lanes import Lane, Lanes, Read
from worker.positions import LaneRow, Limits, SourceRow
from worker.registry import Handler
from worker.retries import Failure, classify

log = structlog.get_logger(__name__)

MOST_CONDEMNED = 1_000
FIRST_BATCH = 32
SLOW_PASS_SECONDS = 2.0


class Pass(enum.Enum):
    """How a pass over a lane ended."""

    EMPTY = "empty"
    """Nothing above the position."""
    MORE = "more"
    """A full batch was applied; there may be more."""
    BUSY = "busy"
    """Another worker has the row, or another transaction was in the way."""
    AWAY = "away"
    """The database is away."""
    MEETING = "meeting"
    """The next change belongs to several lanes, and another one has not got there yet."""
    UNKNOWN = "unknown"
    """No such lane: the handler is not active, or the number of lanes has changed."""


@dataclass
class Progress:
    """What one transaction did, for those who act after its commit."""

    applied: int = 0
    holding: int = 0
    last: Read | None = None
    ended: Pass = Pass.EMPTY
    wake: set[int] = field(default_factory=set)
    """Other lanes that can go on now."""
    latest_at: float = 0.0
    """When the listener had the newest change applied, in seconds since 1970."""


class Drain:
    """Drains the lanes of one handler."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        lanes: Lanes,
        caller: Caller,
        decoder: Decoder,
        limits: Limits,
        batch: int,
    ) -> None:
        self.handler: Handler = caller.handler
        self._engine = engine
        self._lanes = lanes
        self._caller = caller
        self._decoder = decoder
        self._limits = limits
        self._batch = batch
        self._most = min(batch, FIRST_BATCH)
        self._condemned: OrderedDict[object, Failure] = OrderedDict()

    async def run(self, lane: Lane) -> Progress:
        """Make one pass over a lane.

        Whatever a handler does ends in a Progress; raises only what is wrong with this program.
        """
        began = time.monotonic()
        try:
            return await self._until_applied(lane)
        finally:
            self._adapt(time.monotonic() - began)

    def _adapt(self, seconds: float) -> None:
        """Take as many changes at once as are applied in about a second.

        The transaction keeps the lane's row locked and must end well before the job's time does.
        """
        if seconds > SLOW_PASS_SECONDS:
            self._most = max(1, self._most // 4)
        elif seconds < SLOW_PASS_SECONDS / 4:
            self._most = min(self._batch, self._most * 2)

    async def _until_applied(self, lane: Lane) -> Progress:
        careful, together = False, True
        for _ in range(self._batch + 2):
            try:
                return await self._pass(lane, careful=careful, together=together)
            except CallFailedError:
                careful = True
            except TransactionSpoiltError:
                careful, together = True, False
            except LaneBlockedError as blocked:
                cause = blocked.__cause__ or blocked
                return Progress(ended=Pass.BUSY) if is_conflict(cause) else self._away(cause)
            except RedisError as error:
                log.warning("lane waits for Redis", handler=lane.handler, error_class=type(error).__name__)
                return Progress(ended=Pass.AWAY)
            except Exception as error:
                if is_locked(error) or is_conflict(error):
                    return Progress(ended=Pass.BUSY)
                if is_away(error):
                    return self._away(error)
                if careful or not isinstance(error, DBAPIError):
                    raise
                careful = True  # COMMIT failed: a deferred constraint; find out whose it is
        return Progress(ended=Pass.BUSY)

    def _away(self, error: BaseException) -> Progress:
        log.warning(
            "lane waits for the database", handler=self.handler.name, error_class=type(error).__name__
        )
        return Progress(ended=Pass.AWAY)

    async def _pass(self, lane: Lane, *, careful: bool, together: bool) -> Progress:
        progress = Progress()
        async with AsyncSession(self._engine, expire_on_commit=False) as session, session.begin():
            row = await positions.lock(session, lane, self._limits)
            if row is None:
                return Progress(ended=Pass.UNKNOWN)
            source = await positions.read_source(session)
            if source.generation is None:
                return progress
            blocked: set[bytes] = set()
            if row.holding:
                blocked = await self._retry(session, lane, progress, source)
            most = self._most
            reads = await self._lanes.read(source.generation, lane, row.position, most)
            reads = await self._chained(session, lane, row, source, reads)
            batch = _until_meeting(reads)
            if batch:
                await self._apply(session, lane, batch, blocked, progress, source, careful, together)
                progress.last = batch[-1]
            elif reads:
                meeting = meetings.Meeting(session, lane, row, reads[0])
                await self._meet(meeting, blocked, progress, source, careful=careful)
            if progress.last is not None:
                at = progress.last.position
                others = sorted(meetings.other_lanes(progress.last, lane)) if not batch else []
                await self._move(session, [lane, *(Lane(lane.handler, n) for n in others)], at, progress)
            elif progress.applied or progress.holding:
                await self._move(session, [lane], row.position, progress)
        # Committed. Redis may forget what Postgres knows; if it does not hear of it, the next pass says it again.
        more = len(reads) >= most or len(batch) < len(reads)
        await self._after_commit(lane, source.generation, row, progress, more=more)
        return progress

    async def _after_commit(
        self, lane: Lane, generation: str, row: LaneRow, progress: Progress, *, more: bool
    ) -> None:
        if progress.last is not None:
            progress.ended = Pass.MORE if more else progress.ended
            await self._lanes.trim(generation, lane, progress.last)
            for number in meetings.other_lanes(progress.last, lane):
                await self._lanes.pass_over(generation, Lane(lane.handler, number), progress.last.position)
        elif progress.ended is Pass.EMPTY:
            await self._lanes.pass_over(generation, lane, row.position)

    async def _move(self, session: AsyncSession, lanes: list[Lane], to: Position, progress: Progress) -> None:
        await positions.move(session, lanes, to, applied=progress.applied, holding=progress.holding)

    async def _chained(
        self, session: AsyncSession, lane: Lane, row: LaneRow, source: SourceRow, reads: list[Read]
    ) -> list[Read]:
        """Check that nothing is missing between the position and what was read.

        An entry names the one before it. In plain delivery nobody can read a lost one again: the hole is
        recorded as a gap, in the transaction that passes it, and derive handlers are backfilled for it.
        """
        before = row.position
        floor = str(source.floor)
        for read in reads:
            previous = read.entry.previous
            if previous != floor and Position.parse(previous) > before:
                tables = [(one.schema, one.table) for one in self.handler.subscriptions]
                await gaps.record(session, cause="entries of a lane were lost in Redis", tables=tables)
                log.error(
                    "gap",
                    handler=lane.handler,
                    lane=lane.number,
                    cause="entries of a lane were lost in Redis",
                )
            before = read.position
        return reads

    # Fresh changes

    async def _apply(
        self,
        session: AsyncSession,
        lane: Lane,
        batch: Sequence[Read],
        blocked: set[bytes],
        progress: Progress,
        source: SourceRow,
        careful: bool,  # noqa: FBT001 - as above
        together: bool,  # noqa: FBT001 - as above
    ) -> None:
        progress.latest_at = batch[-1].entry.at
        if self.handler.kind == "derive":
            await self._apply_keys(
                session, lane, batch, blocked, progress, careful=careful, together=together
            )
        else:
            await self._apply_changes(
                session, lane, batch, blocked, progress, source, careful=careful, together=together
            )

    async def _apply_keys(
        self,
        session: AsyncSession,
        lane: Lane,
        batch: Sequence[Read],
        blocked: set[bytes],
        progress: Progress,
        *,
        careful: bool,
        together: bool,
    ) -> None:
        """Call a derive handler with each key once, however many changes lie behind it."""
        waiting: dict[bytes, int] = {}
        counts: dict[bytes, int] = {}
        for _, entry in batch:
            held_key = next((key for key in entry.keys if key in blocked), None)
            if held_key is not None:
                waiting[held_key] = waiting.get(held_key, 0) + 1
            # A change of several keys counts once: with its first.
            for n, key in enumerate(key for key in entry.keys if key not in blocked):
                counts[key] = counts.get(key, 0) + (1 if n == 0 and held_key is None else 0)
        for key, changes in waiting.items():
            await held.absorb(session, lane.handler, key, changes)
        items = [KeyItem(key, self._decoder.key(key), changes) for key, changes in counts.items()]
        call = lambda some: self._caller.keys(session, [item.value for item in some])  # noqa: E731 - bound to this session
        if not careful:
            await self._whole(call, items)
            progress.applied += sum(counts.values())
            return
        outcome = await self._isolate(
            session, call, items, lambda item: (item.key,), lambda item: item.key, together=together
        )
        progress.applied += sum(item.changes for item in outcome.applied)
        for item, failure in outcome.failed:
            self._told(lane, failure)
            await held.hold(
                session,
                lane.handler,
                lanes=(lane.number,),
                keys=(item.key,),
                position=batch[-1].position,
                source="key",
                payload=b"",
                changes=item.changes,
                failure=failure,
            )
            progress.holding += failure.delay is not None

    async def _apply_changes(
        self,
        session: AsyncSession,
        lane: Lane,
        batch: Sequence[Read],
        blocked: set[bytes],
        progress: Progress,
        source: SourceRow,
        *,
        careful: bool,
        together: bool,
    ) -> None:
        """Call a change handler with each change once, in order; later changes of a held key wait behind it."""
        free: list[Read] = []
        behind: list[Read] = []
        for read in batch:
            if blocked.isdisjoint(read.entry.keys):
                free.append(read)
            else:
                blocked.update(read.entry.keys)
                behind.append(read)
        items = await self._decoder.changes(session, free)
        name = lambda change: self.name_of(change.position, source)  # noqa: E731 - bound to this history
        call = lambda some: self._caller.changes(session, [item.change for item in some], name)  # noqa: E731 - as above
        if not careful:
            await self._whole(call, items)
            progress.applied += len(items)
        else:
            outcome = await self._isolate(
                session,
                call,
                items,
                lambda item: item.read.entry.keys,
                lambda item: (lane.number, item.read.position),
                together=together and self.handler.wants_list,
            )
            progress.applied += len(outcome.applied)
            for item, failure in outcome.failed:
                self._told(lane, failure)
                await self._hold(session, lane, item.read, progress, failure)
            behind += [item.read for item in outcome.behind]
        for read in sorted(behind, key=lambda one: one.position):
            await self._hold(session, lane, read, progress, None)

    async def _hold(
        self, session: AsyncSession, lane: Lane, read: Read, progress: Progress, failure: Failure | None
    ) -> None:
        entry = read.entry
        await held.hold(
            session,
            lane.handler,
            lanes=entry.lanes,
            keys=entry.keys,
            position=read.position,
            source=entry.source,
            payload=entry.payload,
            failure=failure,
        )
        progress.holding += failure is None or failure.delay is not None

    async def _whole(self, call: Any, items: Sequence[Any]) -> None:  # noqa: ANN401 - as Isolation takes them
        """Call with the whole batch, without savepoints: nearly always all is well."""
        if not items:
            return
        try:
            size = self.handler.batch or len(items)
            for start in range(0, len(items), size):
                await call(items[start : start + size])
        except Exception as error:
            if classify(error, 1, self._caller.backoff) is None:
                raise LaneBlockedError from error
            raise CallFailedError from error

    async def _isolate(
        self,
        session: AsyncSession,
        call: Any,  # noqa: ANN401 - as Isolation takes it
        items: Sequence[Any],
        keys: Any,  # noqa: ANN401 - as above
        identity: Any,  # noqa: ANN401 - as above
        *,
        together: bool,
    ) -> Any:  # noqa: ANN401 - the outcome of those items
        isolation = Isolation(
            session,
            call=call,
            keys=keys,
            judge=lambda item, error: classify(error, getattr(item, "attempt", 1), self._caller.backoff),
            condemned=lambda item: self._condemned.pop(identity(item), None),
            condemn=lambda item, failure: self._condemn(identity(item), failure),
            together=together,
        )
        size = self.handler.batch or max(1, len(items))
        for start in range(0, len(items), size):
            await isolation.apply(items[start : start + size])
        return isolation.outcome

    def _condemn(self, identity: object, failure: Failure) -> None:
        """Remember a failure beyond its transaction, which it may have taken with it."""
        self._condemned[identity] = failure
        if len(self._condemned) > MOST_CONDEMNED:
            self._condemned.popitem(last=False)

    def _told(self, lane: Lane, failure: Failure) -> None:
        log.warning(
            "handler failed",
            handler=lane.handler,
            lane=lane.number,
            error_class=failure.error_class,
            retry_in_seconds=None if failure.delay is None else round(failure.delay, 1),
        )

    # Held changes

    async def _retry(
        self, session: AsyncSession, lane: Lane, progress: Progress, source: SourceRow
    ) -> set[bytes]:
        """Try what is held and due, in order; return the keys that still wait."""
        blocked: set[bytes] = set()
        rows = await held.waiting(session, lane)
        for row in rows:
            if not row.due or not blocked.isdisjoint(row.keys):
                blocked.update(row.keys)
                continue
            if not await self._try_again(session, lane, row, progress, source):
                blocked.update(row.keys)
        if len(rows) >= held.MOST_AT_ONCE:
            blocked |= await held.held_keys(session, lane.handler, [lane.number])
        return blocked

    async def _try_again(
        self, session: AsyncSession, lane: Lane, row: HeldRow, progress: Progress, source: SourceRow
    ) -> bool:
        """Call again for one held change; True where it need not wait any longer."""
        others = [number for number in row.lanes if number != lane.number]
        if others and lane.number != min(row.lanes):
            return False  # its lowest lane does it
        if others:
            await positions.lock_others(session, lane.handler, others)
        failure = await self._call_again(session, row, source)
        if failure is not None:
            self._told(lane, failure)
            await held.failed_again(session, row, failure)
        else:
            await held.let_go(session, row)
            progress.applied += row.changes
        if failure is None or failure.delay is None:
            progress.holding -= 1
            for number in others:
                await positions.release_hold(session, Lane(lane.handler, number))
            progress.wake.update(others)
            return True
        return False

    async def _call_again(self, session: AsyncSession, row: HeldRow, source: SourceRow) -> Failure | None:
        identity = ("held", row.id)
        if (known := self._condemned.pop(identity, None)) is not None:
            return known
        if row.source == "key":
            item: KeyItem | Item = KeyItem(row.keys[0], self._decoder.key(row.keys[0]), row.changes)
            call = lambda some: self._caller.keys(session, [one.value for one in some])  # noqa: E731 - bound to this session
        else:
            item = await self._decoder.held(session, row)
            name = lambda change: self.name_of(change.position, source)  # noqa: E731 - bound to this history
            call = lambda some: self._caller.changes(session, [one.change for one in some], name)  # noqa: E731 - as above
        isolation: Isolation[KeyItem | Item] = Isolation(
            session,
            call=call,
            keys=lambda _: row.keys,
            judge=lambda _, error: classify(error, row.attempts + 1, self._caller.backoff),
            condemned=lambda _: None,
            condemn=lambda _, failure: self._condemn(identity, failure),
            together=False,
        )
        await isolation.apply([item])
        if isolation.outcome.failed:
            self._condemned.pop(identity, None)
            return isolation.outcome.failed[0][1]
        return None

    # Changes of several lanes

    async def _meet(
        self,
        meeting: meetings.Meeting,
        blocked: set[bytes],
        progress: Progress,
        source: SourceRow,
        *,
        careful: bool,
    ) -> None:
        read = meeting.read
        if not await meeting.all_arrived():
            progress.ended = Pass.MEETING
            progress.wake.update(meeting.others)
            return
        blocked = blocked | await held.held_keys(meeting.session, meeting.lane.handler, read.entry.lanes)
        await self._apply_changes(
            meeting.session, meeting.lane, [read], blocked, progress, source, careful=careful, together=False
        )
        progress.last = read
        progress.latest_at = read.entry.at
        progress.wake.update(meeting.others)

    def name_of(self, position: Position, source: SourceRow) -> str:
        """Make the idempotency key of a change: positions alone repeat after a restore."""
        return f"{source.history}:{self.handler.name}:{position}"


def _until_meeting(reads: Sequence[Read]) -> Sequence[Read]:
    """Cut a batch before the first change that belongs to several lanes."""
    for n, read in enumerate(reads):
        if len(read.entry.lanes) > 1:
            return reads[:n]
    return reads


def lag_seconds(progress: Progress) -> float | None:
    """Seconds from the listener's having the newest change of a pass to its being applied."""
    return time.time() - progress.latest_at if progress.latest_at else None


def make_limits(handlers: Mapping[str, Handler], timeout: float, server_version: int) -> Limits:
    """Work out the limits of drains' transactions from the longest handler timeout, in seconds."""
    longest = max([timeout, *(handler.timeout or 0 for handler in handlers.values())])
    idle = int((longest + 5) * 1000)
    return Limits(idle, 0 if server_version < 170000 else idle * 20)  # noqa: PLR2004 - the first with transaction_timeout
