"""One pass over one lane: one Postgres transaction that applies a batch and moves the lane's position.

The order of its steps is what makes it right, and is the same for every delivery: begin, limits, lock the
row without waiting, read position and generation, retry what is held and due, read the stream above the
position, check the chain, call the handler, move the position, commit, and only then trim the stream.
Which worker does it, and when, is not decided here (see turns.py).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker import gaps, overtaking, positions
from worker.change import Position
from worker.database import explain, is_away, is_conflict, is_locked
from worker.draining import parking
from worker.draining.applying import Applying
from worker.draining.calls import Caller, CallFailedError, LaneBlockedError, TransactionSpoiltError
from worker.draining.items import Decoder
from worker.draining.joint import Gate, Joint, has_hole, join
from worker.draining.meetings import Meeting, meet, other_lanes
from worker.draining.notes import Notes, Suspicion, verdict
from worker.draining.parking import Parking
from worker.draining.passes import Pass, Progress, Turn
from worker.draining.truncates import with_kept_keys
from worker.lanes import AT_ONCE, Lane, Lanes, Read
from worker.positions import Limits, Moved, Seen
from worker.registry import Handler
from worker.retries import Failure

log = structlog.get_logger(__name__)

FIRST_BATCH = 32
SLOW_PASS_SECONDS = 2.0
CAREFUL_PASSES = 16
MOST_TRIES = 50
"""Transactions of one pass, each with more care than the one before."""

Take = Callable[[Turn, Sequence[Read]], Awaitable[None]]
"""What is done with entries: applied, or parked."""


class _HoleError(Exception):
    """Something is missing between the position and the next entry."""


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
        seen: Seen | None = None,
    ) -> None:
        self.handler: Handler = caller.handler
        self._engine = engine
        self._lanes = lanes
        self._applying = Applying(caller, decoder)
        self._parking = Parking(self._applying)
        self._limits = limits
        self._batch = batch
        self._most = min(batch, FIRST_BATCH)
        self._visible = seen or Seen()
        self._careful = 0
        self._gate = Gate()
        self._suspicions: dict[Lane, Suspicion] = {}

    def suspect(self, lane: Lane, worker: str, alone: asyncio.Lock) -> None:
        """Note that the worker before this one has died over a lane: perhaps of one of its changes.

        Args:
            lane: which.
            worker: this one.
            alone: held during each pass over such a lane; one for all drains of a worker.
        """
        self._suspicions[lane] = Suspicion(worker, alone)

    async def run(self, lane: Lane) -> Progress:
        """Make one pass over a lane.

        Whatever a handler does ends in a Progress; raises only what is wrong with this program.
        """
        suspicion = self._suspicions.get(lane)
        if suspicion is None:
            return await self._timed(lane)
        async with suspicion.alone:
            return await self._timed(lane)

    async def _timed(self, lane: Lane) -> Progress:
        began = time.monotonic()
        full = False
        try:
            async with self._gate.passing():
                progress = await self._until_applied(lane)
            full = progress.ended is Pass.MORE and progress.applied > 0
            return progress
        finally:
            self._adapt(time.monotonic() - began, full=full)

    def _adapt(self, seconds: float, *, full: bool) -> None:
        """Take as many changes at once as are applied in about a second.

        The transaction keeps the lane's row locked and must end well before the job's time does.
        """
        if seconds > SLOW_PASS_SECONDS:
            self._most = max(1, self._most // 4)
        elif full and seconds < SLOW_PASS_SECONDS / 4:
            self._most = min(self._batch, self._most * 2)

    async def _until_applied(self, lane: Lane) -> Progress:
        # After a failure others are likely: a pass with care costs less than two passes.
        careful, together = self._careful > 0, True
        self._careful -= careful
        spoilers: dict[object, Failure] = {}
        for _ in range(MOST_TRIES):
            try:
                progress, generation = await self._pass(lane, careful, together, spoilers)
                return await self._after_commit(lane, generation, progress)
            except CallFailedError:
                careful, self._careful = True, CAREFUL_PASSES
            except TransactionSpoiltError as spoilt:
                careful = True
                if spoilt.spoiler is None:
                    together = False
                else:
                    spoilers[spoilt.spoiler] = spoilt.failure
            except _HoleError:
                return await self._ask_reread(lane)
            except LaneBlockedError as blocked:
                cause = blocked.__cause__ or blocked
                return _stopped_by(cause) or Progress(ended=Pass.AWAY, reason=explain(cause))
            except Exception as error:
                if (stopped := _stopped_by(error)) is not None:
                    return stopped
                if careful or not isinstance(error, DBAPIError):
                    raise
                careful = True  # COMMIT failed, or a handler swallowed an error: find out whose it is
        return Progress(ended=Pass.BUSY)

    async def _pass(
        self,
        lane: Lane,
        careful: bool,  # noqa: FBT001 - handed on to the turn
        together: bool,  # noqa: FBT001 - as above
        spoilers: dict[object, Failure],
    ) -> tuple[Progress, str | None]:
        progress = Progress()
        async with AsyncSession(self._engine, expire_on_commit=False) as session, session.begin():
            taken = await positions.take(session, lane, self._limits)
            if taken is None:
                return Progress(ended=Pass.UNKNOWN), None
            row, source = taken
            if source.generation is None:
                return progress, None
            if not source.same_server:
                reason = "Postgres was restarted or replaced: waiting for the listener to read the log again"
                return Progress(ended=Pass.AWAY, reason=reason), None
            progress.at = row.position
            turn = Turn(session, lane, row, source, progress, careful, together, spoilers)
            if (suspicion := self._suspicions.get(lane)) is not None:
                progress.notes = await Notes.open(self._lanes, lane, suspicion)
                turn = replace(turn, notes=progress.notes)
            more = not source.paused and row.holding > 0 and await self._applying.retry(turn)
            met, further = await self._pass_entries(turn)
            await self._write(turn, met)
        if progress.ended is Pass.EMPTY and (more or further or spoilers):
            progress.ended = Pass.MORE
        return progress, source.generation

    async def _pass_entries(self, turn: Turn) -> tuple[Sequence[int], bool]:
        """Apply what stands in the stream above the position, or park it.

        Returns the other lanes that have been moved with this one, and whether there may be more.
        """
        progress = turn.progress
        found, parks, full = await self._found(turn)
        if turn.row.parked > 0 and not parks and not turn.source.paused:
            # What is parked came before all that is in the stream.
            await self._parking.unpark(turn, self._most)
            return [], True
        take = self._parking.park if parks else self._applying.fresh
        reads = await self._seen(turn, found)
        if turn.notes is not None and not parks:
            turn, reads = await self._few(turn, turn.notes, reads)
            full = True
        if batch := self._applying.cut(turn, _until_meeting(reads)):
            await self._chained(turn, batch)
            batch = await with_kept_keys(turn, self.handler, self._applying.decoder, batch)
            await take(turn, batch)
            progress.last, progress.read = batch[-1], sum(read.entry.changes for read in batch)
            return [], full or len(batch) < len(reads)
        if reads and (joint := await self._joint(turn, reads, parks=parks)) is not None:
            return await self._together(turn, joint, take)
        if reads:
            met = await self._meet(turn, reads[0], take)
            if progress.ended is Pass.MEETING and turn.row.parked > 0 and not turn.source.paused:
                # A lane that is to be parked and waits for others goes on with what is parked meanwhile.
                await self._parking.unpark(turn, self._most)
                progress.ended = Pass.MORE
            return met, False
        if found:
            progress.ended = Pass.SOON
        return [], False

    async def _found(self, turn: Turn) -> tuple[list[Read], bool, bool]:
        """Read entries above the position; tell whether to park them, and whether there may be more."""
        generation, lane, position = str(turn.source.generation), turn.lane, turn.row.position
        most = self._most  # passes over other lanes change it meanwhile
        if turn.notes is not None and turn.notes.suspicion.until is None:
            most = self._batch  # all that the dead worker may have had in hand
        reads, park_to = await self._lanes.read(generation, lane, position, most)
        if not reads or not (turn.source.paused or reads[0].entry.count <= park_to):
            return reads, False, len(reads) >= min(most, AT_ONCE)
        if len(reads) == most:
            reads, _ = await self._lanes.read(generation, lane, position, parking.AT_ONCE)
        if not turn.source.paused:
            reads = [read for read in reads if read.entry.count <= park_to]
        return reads, True, True

    async def _few(self, turn: Turn, notes: Notes, reads: list[Read]) -> tuple[Turn, list[Read]]:
        """Of a lane under suspicion take a few entries, and note the call; or judge the first of them."""
        suspicion = notes.suspicion
        if suspicion.until is None and reads:
            suspicion.until = reads[-1].position
        if not reads or suspicion.until is None or reads[0].position > suspicion.until:
            self._suspicions.pop(turn.lane, None)
            return turn, reads
        position, entry = reads[0]
        failure = verdict(notes.deaths(position), self._applying.policy)
        if failure is None:
            reads = reads[: notes.few(position)]
            await notes.begin(position, reads[-1].position)
            return turn, reads
        culprits: Sequence[object] = entry.keys if self.handler.kind == "derive" else (position,)
        turn.spoilers.update(dict.fromkeys(culprits, failure))
        return replace(turn, careful=True), reads[:1]

    async def _seen(self, turn: Turn, reads: list[Read]) -> list[Read]:
        """Cut off what is decoded but cannot be seen yet: a handler would compute from the old state."""
        xids = {read.entry.xid for read in reads if read.entry.xid is not None}
        if not xids:
            return reads
        visible = await self._visible.visible(turn.session, str(turn.source.generation), xids)
        for n, read in enumerate(reads):
            if read.entry.xid is not None and read.entry.xid not in visible:
                return reads[:n]
        return reads

    async def _joint(self, turn: Turn, reads: list[Read], *, parks: bool) -> Joint | None:
        """See whether several lanes can go on, or be parked, in this transaction."""
        # What is under suspicion is taken one by one, and by its own lane's passes.
        if turn.notes is not None or turn.spoilers or len(reads[0].entry.lanes) == 1:
            return None
        if has_hole(turn.row.position, reads, turn.source.floor):
            return None
        shunned = {lane.number for lane in self._suspicions}
        async with self._gate.taking() as alone:
            if not alone:
                return None
            most = parking.AT_ONCE if parks else self._most
            return await join(turn, reads, self._lanes, most, self._seen, shunned, parks=parks)

    async def _together(self, turn: Turn, joint: Joint, take: Take) -> tuple[Sequence[int], bool]:
        """Apply or park the next changes of several lanes; returns as `_pass_entries` does."""
        progress = turn.progress
        await take(turn, joint.batch)
        progress.last = joint.lasts.pop(turn.lane.number)
        progress.read = sum(read.entry.changes for read in joint.batch)
        progress.others = joint.lasts
        progress.wake.update(joint.behind - {turn.lane.number})
        return [], True

    async def _meet(self, turn: Turn, read: Read, take: Take) -> Sequence[int]:
        """Go to a change of several lanes; return the other lanes that have been moved past it."""
        progress, lane = turn.progress, turn.lane
        if await self._chained(turn, [read]):
            # What is missing is passed now: whoever applies the change knows nothing of the hole.
            progress.at = Position.parse(read.entry.previous)
            await positions.move(turn.session, lane, progress.at)
        state = await meet(turn, read)
        if state is Meeting.WAITING:
            progress.ended = Pass.MEETING
            return []
        others = other_lanes(read, lane)
        progress.last, progress.ended = read, Pass.MORE
        progress.wake.update(others)
        if state is Meeting.READY:
            await take(turn, [read])
            progress.read = read.entry.changes
            return others
        log.error(
            "change left to its gap", handler=lane.handler, lane=lane.number, position=str(read.position)
        )
        return []

    async def _write(self, turn: Turn, met: Sequence[int]) -> None:
        """Move the lane, and with a change of several lanes the others too; the counters with them."""
        progress, session, handler = turn.progress, turn.session, turn.lane.handler
        if progress.last is not None:
            progress.at = progress.last.position
        holding = {number: rows for number, rows in progress.holding.items() if rows}
        parked = progress.parked
        if progress.last is not None or progress.applied or any(parked.values()) or holding:
            number = turn.lane.number
            own = Moved(progress.read, progress.applied, holding.pop(number, 0), parked[number])
            await positions.move(session, turn.lane, progress.at, own)
        for number, read in sorted(progress.others.items()):
            moved = Moved(holding=holding.pop(number, 0), parked=parked[number])
            await positions.move(session, Lane(handler, number), read.position, moved)
        for number in met:
            moved = Moved(holding=holding.pop(number, 0), parked=parked[number])
            await positions.move(session, Lane(handler, number), progress.at, moved)
        for number, rows in holding.items():
            await positions.count_held(session, Lane(handler, number), rows)
        # Only a pass that calls again, or with care, makes a dead letter.
        may_overtake = turn.source.has_dead or turn.careful or progress.retried
        if may_overtake and self.handler.kind == "change":
            await overtaking.note(session, handler, progress.done)

    async def _ask_reread(self, lane: Lane) -> Progress:
        """Have the lanes filled again from the slot; nothing was applied."""
        cause = "entries of a lane were lost in Redis"
        async with self._engine.begin() as connection:
            source = await positions.read_source(connection)
            if source.generation is not None:
                await positions.ask_reread(connection, source.generation, cause)
        log.warning("asking the listener to read again", handler=lane.handler, lane=lane.number, cause=cause)
        return Progress(ended=Pass.HOLE)

    async def _after_commit(self, lane: Lane, generation: str | None, progress: Progress) -> Progress:
        """Let Redis forget what Postgres knows; if it does not hear of it, the next pass says it again."""
        if generation is None:
            return progress
        try:
            if progress.notes is not None:
                await progress.notes.end()
            if progress.last is not None:
                await self._lanes.trim(generation, lane, progress.last)
                for number, read in progress.others.items():
                    await self._lanes.trim(generation, Lane(lane.handler, number), read)
                for number in other_lanes(progress.last, lane) if not progress.others else ():
                    await self._lanes.pass_over(generation, Lane(lane.handler, number), progress.at)
            elif progress.ended is Pass.EMPTY:
                await self._lanes.pass_over(generation, lane, progress.at)
        except RedisError as error:
            progress.ended, progress.reason = Pass.AWAY, _redis(error)
        return progress

    async def _chained(self, turn: Turn, reads: Sequence[Read]) -> bool:
        """Check that nothing is missing between the position and what is to be applied; True where it is.

        An entry names the one before it. In plain delivery nobody can read a lost one again: the hole is
        recorded as a gap, in the transaction that passes it, and derive handlers are backfilled for it.
        """
        hole = has_hole(turn.row.position, reads, turn.source.floor)
        if hole and turn.source.delivery == "proven":
            raise _HoleError
        if hole:
            cause = "entries of a lane were lost in Redis"
            tables = sorted({(one.schema, one.table) for one in self.handler.subscriptions})
            await gaps.record(turn.session, cause=cause, tables=tables)
            log.error("gap", handler=turn.lane.handler, lane=turn.lane.number, cause=cause)
        return hole


def _stopped_by(error: BaseException) -> Progress | None:
    """Tell how a pass ends that an error has stopped; None where the error is no reason to wait."""
    if isinstance(error, RedisError):
        return Progress(ended=Pass.AWAY, reason=_redis(error))
    if is_locked(error) or is_conflict(error):
        return Progress(ended=Pass.BUSY)
    if is_away(error):
        return Progress(ended=Pass.AWAY, reason=explain(error))
    return None


def _redis(error: RedisError) -> str:
    return f"Redis cannot be used ({type(error).__name__}): check REDIS_URL and its memory"


def _until_meeting(reads: Sequence[Read]) -> Sequence[Read]:
    """Cut a batch before the first change that belongs to several lanes, or to all keys of the only one."""
    for n, read in enumerate(reads):
        if len(read.entry.lanes) > 1 or (read.entry.payload and not read.entry.keys):
            return reads[:n]
    return reads


def make_limits(handlers: Mapping[str, Handler], timeout: float, server_version: int) -> Limits:
    """Work out the limits of drains' transactions from the longest handler timeout, in seconds."""
    longest = max([timeout, *(handler.timeout or 0 for handler in handlers.values())])
    idle = int((longest + 5) * 1000)
    return Limits(idle, 0 if server_version < 170000 else idle * 20)  # noqa: PLR2004 - the first with transaction_timeout
