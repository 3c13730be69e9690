"""Rounds: a process is struck at one point after another, and each time everything must be accounted for.

What waits for a time limit of ours (the lease, the sign of life of a worker) is not waited for: the limit is
made to have passed. Limits that Postgres enforces do their work themselves, for whether they were set is a
part of what is tried.
"""

import asyncio
import itertools
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from redis.asyncio import Redis

from tests.awaits import story as told
from tests.awaits import tables
from tests.awaits.nursery import Born, Nursery, Role
from tests.awaits.points import choose, sample
from tests.awaits.stepping import Deed, Point
from tests.awaits.story import Note, Story, misfit
from tests.stack import Project, Servers, project

STUCK_SECONDS = 45.0
"""Without any progress: how long a round takes is the machine's affair."""
SETTINGS = {
    "WORKER_DELIVERY": "proven",
    "WORKER_LANES": "4",
    "WORKER_LANE_BACKLOG": "5",
    "WORKER_BACKOFF_SECONDS": "0.05",
    "WORKER_BACKOFF_MAX_SECONDS": "0.3",
    "WORKER_MAX_ATTEMPTS": "1000",
    # With it goes the time after which Postgres ends the transaction of a frozen worker.
    "WORKER_HANDLER_TIMEOUT": "1",
}
_slots = itertools.count(1)
_COUNTS = """
select string_agg(format('%s: %s read, %s applied', name, read, applied), '; ') from (
  select name, coalesce(sum(read), 0) as read, coalesce(sum(applied), 0) as applied
  from (values ('totals'), ('by_row'), ('by_owner')) names (name)
  left join tailrace.lanes on handler = name group by name
) counted
"""
_PASSED = f"{_COUNTS} where read <> {{committed}}"
_SETTLED = f"""
select concat_ws('; ', ({_COUNTS} where (read, applied) <> ({{committed}}, {{committed}})),
  (select 'held: ' || nullif(count(*), 0) from tailrace.held),
  (select 'backfills: ' || nullif(count(*), 0) from tailrace.backfills where state <> 'done'),
  (select 'wrong totals: ' || nullif(count, 0) from ({tables.DIFFERENCES}) differences))
"""


class UnaccountedError(AssertionError):
    """Something was lost, doubled, out of order or not accounted for."""


@dataclass
class Outcome:
    """What a run was."""

    counted: set[str] = field(default_factory=set)
    """Places at which the process stood when nothing happened to it."""
    struck: list[Point] = field(default_factory=list)
    missed: list[Point] = field(default_factory=list)
    """Points that it did not come by."""
    failed: list[tuple[Point, str]] = field(default_factory=list)

    @property
    def places(self) -> set[str]:
        """Places at which it was struck."""
        return {point.place for point in self.struck}


class Stage:
    """A project with the partner of the process that is struck, round after round."""

    def __init__(self, made: Project, nursery: Nursery, role: Role, folder: Path) -> None:
        self._made = made
        self._nursery = nursery
        self._role = role
        self._story = Story(made.db)
        self._committed = 0
        self._born: list[Born] = []
        self._late = folder / made.environment["WORKER_SLOT"]
        """Made when the last chapter begins: the last visit of a place has no number known before."""

    @classmethod
    @asynccontextmanager
    async def open(cls, servers: Servers, nursery: Nursery, role: Role) -> AsyncIterator[Self]:
        """Make a project and start the partner."""
        slot = f"awaits_{next(_slots)}"
        async with project(
            servers, tables.TABLES, "tests.awaits.tables", poll_interval=0.5, **SETTINGS, WORKER_SLOT=slot
        ) as made:
            folder = Path(tempfile.mkdtemp(prefix="awaits-"))
            stage = cls(made, nursery, role, folder)
            try:
                partner = await stage._start("worker" if role == "listener" else "listener")
                await partner.said("working" if role == "listener" else "listening")
                yield stage
            finally:
                shutil.rmtree(folder)
                for process in stage._born:
                    await process.kill()
                of_slot = f"from pg_replication_slots where slot_name = '{slot}'"
                await made.until(f"select count(*) {of_slot} and active", 0)
                await made.db.execute(f"select pg_drop_replication_slot(slot_name) {of_slot}")

    async def _start(self, role: Role, point: Point | None = None) -> Born:
        late = None
        if point is not None and point.visit > 1:
            late = self._late
            late.unlink(missing_ok=True)
        process = await self._nursery.start(role, self._made.environment, point, late)
        self._born = [*(one for one in self._born if one.child.returncode is None), process]
        return process

    # Rounds

    async def begin(self, point: Point | None = None) -> tuple[bool, dict[str, int]]:
        """Let the very first listener begin; it begins at the present, so nothing is written before.

        Returns whether it was struck, and, where it was not, how often it stood at each place.
        """
        if self._role == "worker":
            return False, {}
        first = process = await self._start("listener", point)
        if (struck := await self._struck(first, first.said("listening"))) and point is not None:
            process = await self._succeed(first, point)
            await process.said("listening")
        await first.kill() if struck else await first.terminate()
        await process.kill()
        await self._age()
        return struck, first.child.visits

    async def first(self, point: Point) -> bool:
        """Strike the very first listener, and play a round after it; False where it did not come by."""
        struck, _ = await self.begin(point)
        await self.count()
        return struck

    async def count(self) -> dict[str, int]:
        """Play a round in which nothing happens; returns how often the process stood at each place."""
        process = None
        for chapter in (*told.CHAPTERS, told.epilogue):
            await chapter(self._story)
            process = process or await self._start(self._role)
            await self._settled(process, mended=chapter is not told.busy)
        assert process is not None
        await self._verify(process)
        if await process.terminate() != 0:
            raise UnaccountedError(f"the {self._role} ended in disorder: {process.lines[-10:]}")
        await self._age()
        return process.child.visits

    async def strike(self, point: Point) -> bool:
        """Play a round in which the process is struck; False where it did not come by the point.

        Raises:
            AssertionError: something is not accounted for.
        """
        armed: Born | None = None
        struck = False
        for chapter in told.CHAPTERS:
            if chapter is told.CHAPTERS[-1]:
                self._late.touch()
            await chapter(self._story)
            armed = armed or await self._start(self._role, point)
            struck = await self._struck(armed, self._settled(armed, mended=chapter is not told.busy))
            if struck:
                process = await self._succeed(armed, point)
                await self._settled(process, mended=chapter is not told.busy)
                break
        assert armed is not None
        if not struck:
            armed.child.terminate()
            struck = await self._struck(armed, armed.ended())
            process = await self._succeed(armed, point, leaving=True)
        elif point.deed == "stop":
            armed.child.send_signal(signal.SIGCONT)  # it finds another one in its place
        await told.epilogue(self._story)
        await self._settled(process, mended=True)
        await self._verify(process)
        await armed.kill()
        await process.kill()
        await self._age()
        return struck

    async def _struck(self, armed: Born, other: Coroutine[Any, Any, object]) -> bool:
        """Wait until the process is struck; False where the other thing comes first."""
        waits = [asyncio.ensure_future(one) for one in (armed.child.struck.wait(), armed.child.wait(), other)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if armed.child.struck.is_set():
                return True
            if waits[1].done() and not waits[2].done():
                await asyncio.wait(waits[2:], timeout=1)  # its end may be just what was waited for
            if not waits[2].done():
                raise UnaccountedError(f"the {self._role} ended by itself: {armed.lines[-10:]}")
            await waits[2]
            return False
        finally:
            for one in waits:
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _succeed(self, armed: Born, point: Point, *, leaving: bool = False) -> Born:
        """Start the next process, as if all limits of ours had passed; or wake this one, to go on."""
        if point.deed == "flush" and armed.child.struck.is_set():
            await self._flush()
            await armed.child.stopped()  # it says so before it does so
            armed.child.send_signal(signal.SIGCONT)
            if not leaving:
                return armed
            await armed.ended()
        elif point.deed == "kill" or not armed.child.struck.is_set():
            await armed.ended()
        await self._age()
        return await self._start(self._role)

    async def _flush(self) -> None:
        """Take all from Redis that is this project's, and all of arq's: another project has no other loss."""
        async with Redis.from_url(self._made.servers.redis.url) as client:
            for ours in (f"{self._made.environment['WORKER_QUEUE']}*", "arq:*"):
                keys = [key async for key in client.scan_iter(ours, count=1000)]
                if keys:
                    await client.delete(*keys)

    async def _age(self) -> None:
        """Let the lease end, and the signs of life of workers."""
        if self._role == "listener":
            await self._made.db.execute("update tailrace.source set lease_until = '-infinity'")
            return
        client = Redis.from_url(self._made.servers.redis.url)
        try:
            ours = f"{self._made.environment['WORKER_QUEUE']}:worker:*"
            async for key in client.scan_iter(ours, count=1000):
                await client.delete(key)
        finally:
            await client.aclose()

    # What must be true

    async def _settled(self, process: Born, *, mended: bool) -> None:
        """Wait until all that was committed has been applied; before the mending, applied or held."""
        query = (_SETTLED if mended else _PASSED).format(committed=self._committed + len(self._story.notes))
        before, since = "", time.monotonic()
        while open_ := await self._made.db.fetchval(query):
            if open_ != before:
                before, since = open_, time.monotonic()
            if time.monotonic() > since + STUCK_SECONDS:
                state = await self._state()
                raise UnaccountedError(f"it does not settle: {open_}; {state}; {process.lines[-8:]}")
            await asyncio.sleep(0.1)

    async def _state(self) -> str:
        """Tell what waits, and for what."""
        held = await self._made.db.fetch(
            "select id, handler, lanes, keys, status, attempts, next_attempt_at - clock_timestamp() as due"
            " from tailrace.held order by id limit 20"
        )
        lanes = await self._made.db.fetch(
            "select handler, lane, holding, parked from tailrace.lanes where holding <> 0 or parked <> 0"
        )
        return "; ".join(str(tuple(row)) for row in (*held, *lanes))

    async def _verify(self, process: Born) -> None:
        """See that each handler was given each change once, in order, and that nobody speaks of a gap."""
        db, story = self._made.db, self._story
        if gaps := [row[0] for row in await db.fetch("select cause from tailrace.gaps")]:
            raise UnaccountedError(f"gaps: {gaps}; {process.lines[-8:]}")
        for handler in ("by_row", "by_owner"):
            rows = await db.fetch(
                "select type, id, version, owner, old_owner from derived_seen"
                " where handler = $1 order by seq",
                handler,
            )
            if (found := misfit(story.notes, [Note(*row) for row in rows], handler)) is not None:
                raise UnaccountedError(f"{found}; {process.lines[-8:]}")
        self._committed += len(story.notes)
        story.notes.clear()
        await db.execute("truncate derived_seen")


async def run(
    servers: Servers,
    role: Role,
    *,
    seed: int,
    deeds: Sequence[Deed] = ("kill",),
    most: int | None = None,
    only: str = "",
    at_once: int = 1,
    tell: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Strike a process at its points, each in a round of its own.

    Args:
        servers: where; nobody kills them.
        role: which process.
        seed: of the choice of the points and of their order.
        deeds: what is done to the process.
        most: how many points; None for all.
        only: a part of the names of places, where not all are wanted.
        at_once: projects on which rounds are played side by side.
        tell: is given a line for each round.
    """
    outcome = Outcome()
    nursery = await Nursery.open()
    try:
        beginning, visits = await _counted(servers, nursery, role, 1 if most is not None else 2)
        fresh = set(beginning) - set(visits)
        outcome.counted = fresh | set(visits)
        wanted = {place: n for place, n in (beginning | visits).items() if only in place}
        points = sample(choose(wanted, seed, deeds), len(wanted) * 100 if most is None else most)
        tell(f"{len(outcome.counted)} places, {len(points)} points")
        queue = points[::-1]
        player = _Player(servers, nursery, role, fresh, outcome, tell)
        async with asyncio.TaskGroup() as group:
            for number in range(at_once):
                group.create_task(player.play(queue), name=f"awaits: {number}")
    finally:
        await nursery.close()
    return outcome


async def _counted(
    servers: Servers, nursery: Nursery, role: Role, rounds: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Count the visits of the very first start, and of some rounds: not every one comes by every place."""
    async with Stage.open(servers, nursery, role) as stage:
        _, beginning = await stage.begin()
        visits: dict[str, int] = {}
        for _ in range(rounds):
            visits |= await stage.count()
        return beginning, visits


class _Player:
    """Plays rounds on a project of its own, on a new one whenever something was not accounted for."""

    def __init__(
        self,
        servers: Servers,
        nursery: Nursery,
        role: Role,
        fresh: Collection[str],
        outcome: Outcome,
        tell: Callable[[str], None],
    ) -> None:
        self._servers = servers
        self._nursery = nursery
        self._role = role
        self._fresh = fresh
        self._outcome = outcome
        self._tell = tell

    async def play(self, queue: list[Point]) -> None:
        """Take points from the queue until there are none."""
        while queue:
            async with Stage.open(self._servers, self._nursery, self._role) as stage:
                if queue[-1].place in self._fresh:
                    await self._one(queue.pop(), stage.first)
                    continue
                await stage.begin()
                while queue and queue[-1].place not in self._fresh:
                    if not await self._one(queue.pop(), stage.strike):
                        break

    async def _one(self, point: Point, play: Callable[[Point], Awaitable[bool]]) -> bool:
        """Play a round; False where something was not accounted for."""
        began = time.monotonic()
        try:
            struck = await play(point)
        except AssertionError as error:
            self._outcome.failed.append((point, str(error)))
            self._tell(f"FAILED: {point}: {error}")
            return False
        (self._outcome.struck if struck else self._outcome.missed).append(point)
        self._tell(f"{time.monotonic() - began:4.1f} s  {'' if struck else 'not come by: '}{point}")
        return True
