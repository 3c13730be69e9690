"""Which lanes this worker drains, and when: claims, wake-ups, lingering and the sweep.

A lane is drained by one arq job. The job takes the lane's claim, makes passes until the lane is empty,
waits a little for more (so that a steady trickle costs no job each), and gives the claim back. Everything
here is a hint that may be lost: every worker sweeps all lanes every two seconds, and a claim of a dead worker
counts for nothing. Doing a lane twice, or at the same time, is harmless: the lane's row in Postgres decides.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

import asyncpg
import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import held, parked, positions
from worker.database import explain
from worker.draining.balance import LEAST, Measured, to_hand_over
from worker.draining.drain import Drain
from worker.draining.passes import Pass, Progress
from worker.draining.sharing import Sharing
from worker.draining.trims import Trims
from worker.lanes import CLAIM_SECONDS, Claim, Lane, Lanes, News, Read, heard
from worker.pulse import Pulse
from worker.telemetry import Meters

log = structlog.get_logger(__name__)

SWEEP_SECONDS = 2.0
SWEEP_STUCK_SECONDS = 120.0
"""Longer than it takes to give up a connection that does not come about."""
LINGER_SECONDS = 5.0
"""How long a job waits at an empty lane before it ends."""
TURN_SECONDS = 5.0
"""How long a job keeps a lane that never empties before it is dealt anew, to whichever worker is free."""
MEETING_SECONDS = 0.02
BUSY_SECONDS = 0.05
SOON_SECONDS = 0.002
MOST_PATIENCE_SECONDS = 0.64
"""The two above double with each pass in vain, up to this: what is waited for rings, or may take long."""
AWAY_SECONDS = 1.0
NEWER_SECONDS = 10.0
"""How long a lane that only a newer version can read is left to other workers."""
GATHER_SECONDS = 0.05
"""So much later than it is due is a change retried, together with those that are due by then."""
TELL_AGAIN = 10
"""Sweeps after which a worker tells again that it has next to nothing to do."""
MOST_NEWS = 64
"""Entries kept of what bells have told of a lane; more are read from its stream."""

Enqueue = Callable[[Lane], Awaitable[None]]


class Draining:
    """The part of a worker process that drains lanes."""

    def __init__(
        self,
        *,
        name: str,
        engine: AsyncEngine,
        lanes: Lanes,
        drains: Mapping[str, Drain],
        enqueue: Enqueue,
        at_once: int,
        pulse: Pulse | None = None,
        trims: Trims | None = None,
    ) -> None:
        self.name = name
        self._engine = engine
        self._lanes = lanes
        self._drains = drains
        self._enqueue = enqueue
        self._slots = asyncio.Semaphore(at_once)
        self._trims = trims
        self._bells: dict[Lane, asyncio.Event] = {}
        self._news: dict[Lane, News] = {}
        """Told by bells since the last pass over the lane began."""
        self._sharing = {name: Sharing(self._alone, self._together) for name in drains}
        self._turns: set[asyncio.Task[None]] = set()
        self._generation: str | None = None
        """As the last sweep found it."""
        self._trouble = ""
        self._suspected = asyncio.Lock()
        """Of lanes over which workers have died, one is worked on at a time."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.queued = asyncio.Event()
        """Set when arq's queue may have a new job."""
        self.stopping = asyncio.Event()
        self.swept_at = 0.0
        self.applied = 0
        self.lag_seconds: float | None = None
        self.meters = Meters(drains)
        self._measured = Measured()
        self._looked_at = time.monotonic()
        self._told_load = -1.0
        self._sweeps = 0
        self._given: dict[Lane, str] = {}
        """Lanes that go to another worker after the pass under way."""
        self._newer: dict[Lane, float] = {}
        """Lanes that only a newer version can read, and up to when they are left alone."""
        self._newer_reason = ""
        self._pulse = pulse or Pulse()

    def stuck(self) -> list[str]:
        """Tell which passes, or the sweep, do not get on."""
        return self._pulse.stuck()

    def doing(self) -> str:
        """Tell in a few words what this worker does."""
        if self.stopping.is_set():
            return "stopping"
        if waits := self._trouble or self.newer:
            return f"waiting: {waits}"
        return f"draining {len(self._bells)} lanes" if self._bells else "idle"

    def lanes_now(self) -> dict[str, int]:
        """Count the lanes that are being drained, by handler."""
        now = Counter(lane.handler for lane in self._bells)
        return {name: now[name] for name in self._drains}

    # The job

    def begin(self, lane: Lane) -> None:
        """Begin to drain a lane, in a task of this worker's own: what the arq job does.

        A job ends at once and is arq's no longer: its time limit must not cut a transaction off, and the job
        of a worker that was killed must not stand in the queue for long.
        """
        if lane in self._bells:
            self._bells[lane].set()
        elif not self.stopping.is_set() and not self._leaves_alone(lane):
            task = asyncio.create_task(self.drain(lane), name=f"worker: drain {lane}")
            self._turns.add(task)
            task.add_done_callback(self._over)

    def _leaves_alone(self, lane: Lane) -> bool:
        """Tell whether a lane is left to newer workers for now; the next sweep deals it anew."""
        until = self._newer.get(lane)
        if until is None or time.monotonic() < until:
            return until is not None
        del self._newer[lane]
        return False

    @property
    def newer(self) -> str:
        """Why lanes wait for a worker of a newer version; nothing where none does."""
        now = time.monotonic()
        return self._newer_reason if any(until > now for until in self._newer.values()) else ""

    def _over(self, task: asyncio.Task[None]) -> None:
        self._turns.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # The sweep comes back to the lane; what is wrong with this program must be seen.
            log.error("drain failed", task=task.get_name(), exc_info=error)

    async def drain(self, lane: Lane) -> None:
        """Drain a lane until it is empty, its turn is over, or the worker stops."""
        drain = self._drains.get(lane.handler)
        if drain is None or self.stopping.is_set():
            return
        if lane in self._bells:
            self._bells[lane].set()
            return
        self._bells[lane] = bell = asyncio.Event()
        self._idle.clear()
        handed_over = True
        try:
            claim = await self._lanes.claim(lane, self.name)
            if claim is Claim.FROM_THE_DEAD:
                drain.suspect(lane, self.name, self._suspected)
            if claim is not Claim.REFUSED:
                handed_over = False
                handed_over = await self._turn(drain, lane, bell)
        except (RedisError, OSError) as error:
            self._tell(f"Redis cannot be used ({type(error).__name__})")  # the sweep finds the lane again
        finally:
            if self._bells.get(lane) is bell:
                del self._bells[lane]
                self._news.pop(lane, None)
            if not self._bells:
                self._idle.set()
            if not handed_over:
                with contextlib.suppress(RedisError, OSError):
                    await self._lanes.release(self._generation or "", lane, self.name, always=True)

    async def _turn(self, drain: Drain, lane: Lane, bell: asyncio.Event) -> bool:
        """Make passes; True where the claim has been given back already."""
        until = time.monotonic() + TURN_SECONDS
        in_vain = 0
        while not self.stopping.is_set():
            if drain.shares and lane in self._news:
                progress = await self._sharing[lane.handler].run(lane)
            else:
                progress = await self._alone(lane)
            await self._follow(lane, progress)
            if progress.ended in (Pass.UNKNOWN, Pass.NEWER):
                return False
            if (to := self._given.pop(lane, None)) is not None and await self._hand_over(lane, to):
                return True
            if time.monotonic() > until and progress.ended is not Pass.EMPTY:
                return await self._deal_anew(lane)
            in_vain = in_vain + 1 if progress.ended in (Pass.MEETING, Pass.BUSY, Pass.SOON) else 0
            if progress.ended is Pass.MORE or await self._rest(bell, progress.ended, in_vain):
                continue
            if progress.ended is Pass.EMPTY and await self._leave(lane, bell):
                return True
        return False

    async def _alone(self, lane: Lane) -> Progress:
        """Make a pass over one lane."""
        async with self._slots:
            news = self._begin_pass(lane)
            began = time.monotonic()
            progress = await self._drains[lane.handler].run(lane, news)
        seconds = time.monotonic() - began
        self._measured.spent(lane, seconds)
        self._measure(lane.handler, progress, seconds)
        return progress

    async def _together(self, lanes: Sequence[Lane]) -> Mapping[Lane, Progress]:
        """Make a pass over several lanes of a handler; those that it left out are not in the answer."""
        handler = lanes[0].handler
        async with self._slots:
            begun = {lane: self._begin_pass(lane) for lane in lanes}
            news = {lane: told for lane, told in begun.items() if told is not None}
            began = time.monotonic()
            shared = await self._drains[handler].run_several(news)
        seconds = time.monotonic() - began
        for lane, told in news.items():
            if lane not in shared.lanes:
                later = self._news.pop(lane, None)
                self._note(lane, told.base, told.reads)
                if later is not None:
                    self._note(lane, later.base, later.reads)
        for lane in shared.lanes:
            self._measured.spent(lane, seconds / len(shared.lanes))
        self._measure(handler, shared.progress, seconds)
        return shared.lanes

    def _begin_pass(self, lane: Lane) -> News | None:
        """Hear the bell of a lane: what has rung until now is found by the pass that begins."""
        if lane in self._bells:
            self._bells[lane].clear()
        return self._news.pop(lane, None)

    async def _deal_anew(self, lane: Lane) -> bool:
        """Give up a lane that has more to do, so that a worker with less to do may have it."""
        await self._lanes.release(self._generation or "", lane, self.name, always=True)
        del self._bells[lane]
        await self.wake([lane])
        return True

    async def _hand_over(self, lane: Lane, to: str) -> bool:
        """Give a lane to a worker that has less to do; False where that one is gone."""
        if not await self._lanes.hand_over(self._generation or "", lane, self.name, to):
            return False
        self._measured.forget(lane)
        del self._bells[lane]
        return True

    async def _leave(self, lane: Lane, bell: asyncio.Event) -> bool:
        """Give back the claim of an empty lane; False, and it is kept, where entries have come meanwhile."""
        if self._trims is not None:
            await self._trims.flush()  # what is not trimmed counts as not yet applied
        # First the bell, then the claim: a job that comes in between finds the lane free here, not deaf.
        del self._bells[lane]
        if await self._lanes.release(self._generation or "", lane, self.name) or lane in self._bells:
            return True
        self._bells[lane] = bell
        return False

    def _measure(self, handler: str, progress: Progress, seconds: float) -> None:
        """Count what a pass did; one that found nothing to do would hide those that did."""
        if progress.last is not None or progress.applied or progress.parked:
            changes = max(progress.read, progress.applied)
            lag = max(0.0, time.time() - progress.latest_at) if progress.latest_at else None
            self.meters.passed(handler, changes, seconds, lag)
        if progress.applied or progress.retries or progress.failures:
            self.meters.outcome(handler, progress.applied, progress.retries, progress.failures)

    async def _follow(self, lane: Lane, progress: Progress) -> None:
        if progress.ended is Pass.AWAY:
            self._tell(progress.reason)
        if progress.ended is Pass.NEWER:
            if not self.newer:
                log.warning("waiting for an upgrade", reason=progress.reason)
            self._newer[lane], self._newer_reason = time.monotonic() + NEWER_SECONDS, progress.reason
        if progress.applied:
            self.applied += progress.applied
        if progress.latest_at:
            self.lag_seconds = max(0.0, time.time() - progress.latest_at)
        if progress.due_in < LINGER_SECONDS:
            asyncio.get_running_loop().call_later(progress.due_in + GATHER_SECONDS, self._ring, lane)
        if progress.wake:
            await self.wake(Lane(lane.handler, number) for number in progress.wake)

    async def _rest(self, bell: asyncio.Event, ended: Pass, in_vain: int) -> bool:
        """Wait for the bell; True when it rang."""
        seconds = {
            Pass.MEETING: min(MOST_PATIENCE_SECONDS, MEETING_SECONDS * 2.0 ** min(in_vain, 10)),
            Pass.BUSY: min(MOST_PATIENCE_SECONDS, BUSY_SECONDS * 2.0 ** min(in_vain, 10)),
            Pass.SOON: min(BUSY_SECONDS, SOON_SECONDS * 2.0 ** min(in_vain, 10)),
            Pass.HOLE: AWAY_SECONDS,
            Pass.AWAY: AWAY_SECONDS,
        }.get(ended, LINGER_SECONDS)
        # News from the lane is no reason to ask a Postgres that is away, or a row that is locked.
        awaited = self.stopping if ended in (Pass.BUSY, Pass.AWAY, Pass.SOON, Pass.HOLE) else bell
        try:
            async with asyncio.timeout(seconds):
                await awaited.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self, seconds: float) -> None:
        """Take no more work; let the passes under way end within so many seconds."""
        self.stopping.set()
        self._ring_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        # What does not end by itself is rolled back, and some worker's again.
        for task in list(self._turns):
            task.cancel()
        await asyncio.gather(*self._turns, return_exceptions=True)
        if self._trims is not None:
            await self._trims.flush()

    # Wake-ups

    async def wake(self, lanes: Iterable[Lane]) -> None:
        """Wake whoever drains these lanes, here or elsewhere; start jobs for those that nobody drains."""
        elsewhere = []
        for lane in lanes:
            if lane in self._bells:
                self._bells[lane].set()
            else:
                elsewhere.append(lane)
        if elsewhere:
            for lane in await self._lanes.ring(elsewhere):
                await self._enqueue(lane)

    async def listen(self) -> None:
        """Hear the bells of this worker, for ever; survives the loss of Redis."""
        bell, jobs = f"{self._lanes.prefix}:bell:{self.name}", f"{self._lanes.prefix}:jobs"
        while True:
            try:
                async with self._lanes.redis.pubsub() as pubsub:
                    await pubsub.subscribe(bell, jobs)
                    async for message in pubsub.listen():
                        await self._heard(message)
            except (RedisError, OSError):
                await asyncio.sleep(random.uniform(0.2, 1.0))  # noqa: S311 - jitter, not a secret

    def _ring(self, lane: Lane) -> None:
        """Wake whoever drains the lane in this worker; elsewhere, and later, the sweep finds what is due."""
        if lane in self._bells:
            self._bells[lane].set()

    def _ring_all(self) -> None:
        self.queued.set()
        for bell in self._bells.values():
            bell.set()

    async def _heard(self, message: Mapping[str, object]) -> None:
        if message["type"] == "subscribe":
            # Also after the client has connected anew on its own: whatever rang meanwhile was not heard.
            self._ring_all()
        if message["type"] != "message":
            return
        channel, data = message["channel"], message["data"]
        if not isinstance(channel, bytes) or not isinstance(data, bytes):
            return
        if channel.endswith(b":jobs"):
            self.queued.set()
            return
        base, lanes = heard(data)
        for lane, reads in lanes.items():
            if (bell := self._bells.get(lane)) is not None:
                self._note(lane, base, reads)
                bell.set()
            elif not self.stopping.is_set():
                # A claim of ours without a job: handed over, or Redis was away when it was to be given back.
                self.begin(lane)
                if lane not in self._newer:
                    continue
                await self._lanes.release(self._generation or "", lane, self.name, always=True)
                await self.wake([lane])

    def _note(self, lane: Lane, base: str, reads: list[Read]) -> None:
        """Keep what a bell has told: together with what came before, as long as it is little."""
        before = self._news.pop(lane, None)
        known = before.reads if before is not None and before.base == base else []
        if reads and len(known) + len(reads) <= MOST_NEWS:
            self._news[lane] = News(base, known + reads)

    # The sweep

    async def live(self) -> None:
        """Say that this worker lives, for ever."""
        while True:
            with contextlib.suppress(RedisError, OSError):
                await self._lanes.alive(self.name)
            await asyncio.sleep(CLAIM_SECONDS / 4)

    async def sweep(self) -> None:
        """Look every two seconds for lanes with work that nobody drains, for ever."""
        while True:
            try:
                with self._pulse.working("the sweep", SWEEP_STUCK_SECONDS):
                    await self._sweep_once()
            except RedisError as error:
                self._tell(f"Redis cannot be used ({type(error).__name__})")
            except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                self._tell(explain(error))
            else:
                self._tell("")
                self.swept_at = time.time()
            await asyncio.sleep(SWEEP_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret

    def _tell(self, trouble: str) -> None:
        """Say once what is waited for, and once that it is back."""
        if trouble and not self._trouble:
            log.warning("the worker waits", reason=trouble)
        elif self._trouble and not trouble:
            log.info("the worker goes on")
        self._trouble = trouble

    async def _sweep_once(self) -> None:
        async with self._engine.connect() as connection:
            self._generation = (await positions.read_source(connection)).generation
            if self._generation is None:
                return
            due = {*await held.due_lanes(connection), *await parked.waiting_lanes(connection)}
        for lane in await self._lanes.sweep(self._generation):
            await self._enqueue(lane)
        await self.wake(due)
        await self._balance()

    async def _balance(self) -> None:
        """Tell the others how much there is to do here, and give lanes to those that have less."""
        now = time.monotonic()
        lanes = self._measured.after(now - self._looked_at)
        self._looked_at = now
        load = sum(lanes.values())
        self._sweeps += 1
        # What changes nothing is told again now and then, for Redis may have lost it.
        if load < LEAST and self._told_load < LEAST and self._sweeps % TELL_AGAIN != 1:
            return
        self._told_load = load
        loads = await self._lanes.loads(self.name, load)
        own = {lane: load for lane, load in lanes.items() if lane in self._bells}
        self._given = to_hand_over(self.name, loads, own)
        for lane in self._given:
            self._ring(lane)

    async def leave(self) -> None:
        """Say that this worker is gone, so that nobody waits for its key to expire."""
        with contextlib.suppress(RedisError, OSError):
            await self._lanes.gone(self.name)
