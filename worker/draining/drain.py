"""One pass over one lane: one Postgres transaction that applies a batch and moves the lane's position.

The order of its steps is what makes it right, and is the same for every delivery: begin, limits, lock the
row without waiting, read position and generation, retry what is held and due, read the stream above the
position, check the chain, call the handler, move the position, commit, and only then trim the stream.
Which worker does it, and when, is not decided here (see turns.py).
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import asyncpg
import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import following, overtaking, positions
from worker.database import DATABASE_ERRORS, explain, is_away, is_conflict, is_locked
from worker.draining.applying import Applying
from worker.draining.calls import Caller, CallFailedError, LaneBlockedError, TransactionSpoiltError
from worker.draining.entries import Entries, HoleError
from worker.draining.items import Decoder
from worker.draining.meetings import other_lanes
from worker.draining.notes import Notes, Suspicion
from worker.draining.passes import Pass, Progress, Turn
from worker.draining.several import Several, Shared
from worker.draining.trims import Trims
from worker.draining.worth import Worth
from worker.driver import transaction
from worker.errors import NewerFormat, RedisLost
from worker.frozen import end_frozen
from worker.lanes import Lane, News, check_format
from worker.positions import Limits, Moved, Seen
from worker.pulse import STUCK_SECONDS, Pulse
from worker.registry import Handler
from worker.retries import Failure

log = structlog.get_logger(__name__)

FIRST_BATCH = 32
SLOW_PASS_SECONDS = 2.0
CAREFUL_PASSES = 16
MOST_TRIES = 50
"""Transactions of one pass, each with more care than the one before."""


class Drain:
    """Drains the lanes of one handler."""

    def __init__(
        self,
        *,
        engine: AsyncEngine,
        trims: Trims,
        caller: Caller,
        decoder: Decoder,
        limits: Limits,
        batch: int,
        seen: Seen | None = None,
        pulse: Pulse | None = None,
    ) -> None:
        self.handler: Handler = caller.handler
        self._engine = engine
        self._trims, self._lanes = trims, trims.lanes
        self._traces = caller.traces
        self._applying = Applying(caller, decoder)
        self._limits = limits
        self._batch = batch
        self._most = min(batch, FIRST_BATCH)
        self._careful = 0
        self._pulse = pulse or Pulse()
        self._stuck_seconds = STUCK_SECONDS + caller.timeout
        self._suspicions: dict[Lane, Suspicion] = {}
        self._locked: dict[Lane, float] = {}
        """Lanes that somebody else has had whenever they were tried, and since when."""
        self._entries = Entries(self._applying, trims.lanes, seen or Seen(), self._suspicions, batch)
        self._several = Several(engine, self._applying, self._entries, limits)
        self._worth = Worth()

    def suspect(self, lane: Lane, worker: str, alone: asyncio.Lock) -> None:
        """Note that the worker before this one has died over a lane: perhaps of one of its changes.

        Args:
            lane: which.
            worker: this one.
            alone: held during each pass over such a lane; one for all drains of a worker.
        """
        self._suspicions[lane] = Suspicion(worker, alone)

    async def run(self, lane: Lane, news: News | None = None) -> Progress:
        """Make one pass over a lane.

        Args:
            lane: which.
            news: what stands in its stream above the position, as far as a bell has told.

        Whatever a handler does ends in a Progress; raises only what is wrong with this program.
        """
        suspicion = self._suspicions.get(lane)
        if suspicion is None:
            return await self._timed(lane, news)
        async with suspicion.alone:
            return await self._timed(lane, None)

    async def _timed(self, lane: Lane, news: News | None) -> Progress:
        began = time.monotonic()
        full, taken = False, self._most
        try:
            async with self._entries.gate.passing():
                passing = time.perf_counter()
                progress = await self._until_applied(lane, news)
                self._worth.learn(progress, time.perf_counter() - passing)
            if progress.ended is Pass.BUSY:
                await self._look_for_frozen(lane)
            full, taken = progress.ended is Pass.MORE and progress.applied > 0, progress.read or taken
            return progress
        finally:
            self._adapt(time.monotonic() - began, taken, full=full)

    def _adapt(self, seconds: float, taken: int, *, full: bool) -> None:
        """Take as many changes at once as are applied in about a second.

        The transaction keeps the lane's row locked and must end well before the job's time does.

        Args:
            seconds: that a pass took.
            taken: changes of it.
            full: there was more to be taken.
        """
        if seconds > SLOW_PASS_SECONDS:
            # By what it took itself: passes over several lanes were slow together, and are not to count each.
            self._most = min(self._most, max(1, taken // 4))
        elif full and seconds < SLOW_PASS_SECONDS / 4:
            self._most = min(self._batch, self._most * 2)

    @property
    def shares(self) -> bool:
        """Lanes that have to wait for each other are worth a transaction together."""
        return self._worth.shares and not self._careful and not self._suspicions

    @property
    def _is_told(self) -> bool:
        """Somebody is told what becomes of each change."""
        return self._traces is not None or following.follows()

    async def run_several(self, news: Mapping[Lane, News]) -> Shared:
        """Make one pass over several lanes, whatever of them is plain.

        Args:
            news: what stands in their streams above their positions, as far as bells have told.

        Whatever goes wrong, the lanes that are not in the answer are to be passed over one by one.
        """
        try:
            async with self._entries.gate.passing():
                with self._pulse.working(f"a pass over lanes of {self.handler.name}", self._stuck_seconds):
                    began = time.perf_counter()
                    shared = await self._several.apply(news, self._most, told=self._is_told)
                    seconds = time.perf_counter() - began
        except Exception:  # noqa: BLE001 - each lane's own pass finds out what it is, and tells
            self._worth.keep_apart()
            return Shared()
        self._worth.learn(shared.progress, seconds)
        self._adapt(seconds, shared.progress.read or self._most, full=False)
        for lane, progress in shared.lanes.items():
            await self._after_commit(lane, shared.generation, progress)
        return shared

    async def _until_applied(self, lane: Lane, news: News | None) -> Progress:
        # After a failure others are likely: a pass with care costs less than two passes.
        careful, together = self._careful > 0, True
        self._careful -= careful
        spoilers: dict[object, Failure] = {}
        for _ in range(MOST_TRIES):
            try:
                with self._pulse.working(f"a pass over {lane}", self._stuck_seconds):
                    progress, generation = await self._pass(lane, careful, together, spoilers, news)
                return await self._after_commit(lane, generation, progress)
            except CallFailedError:
                careful, self._careful = True, CAREFUL_PASSES
            except TransactionSpoiltError as spoilt:
                careful = True
                if spoilt.spoiler is None:
                    together = False
                else:
                    spoilers[spoilt.spoiler] = spoilt.failure
            except HoleError:
                return await self._ask_reread(lane)
            except LaneBlockedError as blocked:
                cause = blocked.__cause__ or blocked
                return _stopped_by(cause) or Progress(ended=Pass.AWAY, reason=explain(cause))
            except Exception as error:
                if (stopped := _stopped_by(error)) is not None:
                    return stopped
                if careful or not isinstance(error, (DBAPIError, asyncpg.PostgresError)):
                    raise
                careful = True  # COMMIT failed, or a handler swallowed an error: find out whose it is
        return Progress(ended=Pass.BUSY)

    async def _pass(
        self,
        lane: Lane,
        careful: bool,  # noqa: FBT001 - handed on to the turn
        together: bool,  # noqa: FBT001 - as above
        spoilers: dict[object, Failure],
        news: News | None,
    ) -> tuple[Progress, str | None]:
        progress = Progress(fates=[] if self._is_told else None, began=time.time_ns())
        async with transaction(self._engine) as session:
            taken = await positions.take(session, lane, self._limits)
            self._locked.pop(lane, None)
            if taken is None:
                return Progress(ended=Pass.UNKNOWN), None
            row, source = taken
            check_format(source.format)
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
            more = not source.paused and row.holding > 0 and await self._entries.retry(turn)
            met, further = await self._entries.take(turn, self._most, news)
            await self._write(turn, met)
            progress.commits = time.time_ns()
        if progress.ended is Pass.EMPTY and (more or further or spoilers):
            progress.ended = Pass.MORE
        return progress, source.generation

    async def _write(self, turn: Turn, met: Sequence[int]) -> None:
        """Move the lane, and with a change of several lanes the others too; the counters with them."""
        progress, session, handler = turn.progress, turn.session, turn.lane.handler
        if progress.last is not None:
            progress.at = progress.last.position
        own, holding, parked = turn.lane.number, progress.holding, progress.parked
        if progress.last is not None or progress.applied or parked[own] or holding[own]:
            moved = Moved(progress.read, progress.applied, holding[own], parked[own])
            await positions.move(session, turn.lane, progress.at, moved)
        to = {number: read.position for number, read in progress.others.items()}
        to |= dict.fromkeys(met, progress.at)
        for number in sorted({*to, *holding, *parked} - {own}):
            lane = Lane(handler, number)
            if number in to:
                moved = Moved(holding=holding[number], parked=parked[number])
                await positions.move(session, lane, to[number], moved)
            elif holding[number] or parked[number]:
                await positions.count_waiting(session, lane, holding[number], parked[number])
        if turn.may_overtake and self.handler.kind == "change":
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

    async def _look_for_frozen(self, lane: Lane) -> None:
        """End whoever has a lane for longer than Postgres lets an idle transaction live."""
        now, seconds = time.monotonic(), self._limits.idle_ms / 1000
        if now - self._locked.setdefault(lane, now) < seconds:
            return
        self._locked[lane] = now  # it may as well be a long pass: not asked again for as long
        with contextlib.suppress(*DATABASE_ERRORS):  # the next pass tells what is wrong
            async with self._engine.connect() as connection:
                await end_frozen(connection, seconds)

    async def _after_commit(self, lane: Lane, generation: str | None, progress: Progress) -> Progress:
        """Let Redis forget what Postgres knows; if it does not hear of it, the next pass says it again."""
        if progress.fates:
            if self._traces is not None:
                self._traces.passed(lane.handler, progress)
            following.passed(lane.handler, lane.number, progress.fates)
        if generation is None:
            return progress
        try:
            if progress.notes is not None:
                await progress.notes.end()
            if progress.last is not None:
                await self._trims.add(generation, lane, progress.last)
                for number, read in progress.others.items():
                    await self._trims.add(generation, Lane(lane.handler, number), read)
                for number in other_lanes(progress.last, lane) if not progress.others else ():
                    await self._lanes.pass_over(generation, Lane(lane.handler, number), progress.at)
            elif progress.ended is Pass.EMPTY:
                await self._lanes.pass_over(generation, lane, progress.at)
        except RedisError as error:
            progress.ended, progress.reason = Pass.AWAY, _redis(error)
        return progress


def _stopped_by(error: BaseException) -> Progress | None:
    """Tell how a pass ends that an error has stopped; None where the error is no reason to wait."""
    if isinstance(error, NewerFormat):
        return Progress(ended=Pass.NEWER, reason=str(error))
    if isinstance(error, RedisError | RedisLost):
        return Progress(ended=Pass.AWAY, reason=_redis(error))
    if is_locked(error) or is_conflict(error):
        return Progress(ended=Pass.BUSY)
    if is_away(error):
        return Progress(ended=Pass.AWAY, reason=explain(error))
    return None


def _redis(error: RedisError | RedisLost) -> str:
    return f"Redis cannot be used ({type(error).__name__}): check REDIS_URL and its memory"


def make_limits(handlers: Mapping[str, Handler], timeout: float, server_version: int) -> Limits:
    """Work out the limits of drains' transactions from the longest handler timeout, in seconds."""
    longest = max([timeout, *(handler.timeout or 0 for handler in handlers.values())])
    idle = int((longest + 5) * 1000)
    return Limits(idle, 0 if server_version < 170000 else idle * 20)  # noqa: PLR2004 - the first with transaction_timeout
