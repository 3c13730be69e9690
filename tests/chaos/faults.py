"""What dies, and when: a plan made of a seed, and the hands that carry it out.

The plan repeats by its seed; what it meets on its way does not.
"""

import asyncio
import random
from collections.abc import Sequence
from typing import NamedTuple

from redis.asyncio import Redis

from standin import Standin
from tests.stack import SECRET, Process, Project

KINDS = (
    "listener killed",
    "worker killed",
    "Redis flushed",
    "Redis restarted",
    "Postgres restarted",
    "Realtime killed",
    "Realtime silenced",
    "Realtime drops",
)
RESTART_SECONDS = 0.3


class Planned(NamedTuple):
    """One fault."""

    after: float
    """Seconds from the beginning."""
    kind: str
    lasts: float
    """Seconds; only some kinds last."""

    def __str__(self) -> str:
        return f"{self.after:6.1f} s  {self.kind}"


def plan(seed: int, seconds: float, every: float) -> list[Planned]:
    """Make a plan: each kind in turn comes before any comes again."""
    chance = random.Random(f"{seed}/plan")
    made: list[Planned] = []
    left: list[str] = []
    at = 1.0
    while at < seconds:
        if not left:
            left = list(KINDS)
            chance.shuffle(left)
        made.append(Planned(at, left.pop(), chance.uniform(0.5, 4)))
        # Some come close together: what happens while something else is being mended is where faults hide.
        at += chance.uniform(0.05, 0.5) if chance.random() < 0.3 else chance.uniform(0.7, 1.4) * every
    return made


class Kept:
    """A process that is started again whenever it has ended, as a supervisor would.

    Attributes:
        died: its last log lines, for each time that it ended although nobody had killed it.
        current: the process of now.
    """

    def __init__(self, project: Project, role: str) -> None:
        self.died: list[str] = []
        self.current: Process
        self.role = role
        self._project = project
        self._expected = False
        self._stopping = False
        self._started = asyncio.Condition()

    async def run(self) -> None:
        """Keep it until `stop`."""
        while not self._stopped():
            start = self._project.listener if self.role == "listener" else self._project.worker
            process = await start(wait=False)
            async with self._started:
                self.current = process
                self._expected = False
                self._started.notify_all()
            if self._stopped():
                await process.terminate()
            code = await process.process.wait()
            await process.ended()
            if not self._expected and not self._stopping:
                self.died.append(f"{self.role} ended with {code}: {process.lines[-6:]}")
                await asyncio.sleep(RESTART_SECONDS)  # as a supervisor does

    def _stopped(self) -> bool:
        return self._stopping  # asked for again after each wait

    async def up(self) -> Process:
        """Wait until there is a process."""
        async with self._started:
            await self._started.wait_for(lambda: hasattr(self, "current"))
        return self.current

    async def kill(self) -> None:
        """Send SIGKILL, and return when the next one has been started."""
        process = await self.up()
        self._expected = True
        await process.kill()
        async with self._started:
            await self._started.wait_for(lambda: self.current is not process or self._stopping)

    async def stop(self) -> int:
        """End it for good, as asked to; returns the exit code."""
        self._stopping = True
        return await (await self.up()).terminate()


class Hands:
    """Carries out a plan on a project."""

    def __init__(self, project: Project, listener: Kept, workers: Sequence[Kept], seed: int) -> None:
        self._project = project
        self._listener = listener
        self._workers = workers
        self._random = random.Random(f"{seed}/hands")
        self._standin = project.standin
        self._port = int(project.standin.supabase_url.rsplit(":", 1)[1])

    async def carry_out(self, planned: Sequence[Planned]) -> None:
        """Do it all; in the end everything runs again."""
        began = asyncio.get_running_loop().time()
        # Faults overlap: a killed server is away while another fault comes.
        locks = {"Redis": asyncio.Lock(), "Postgres": asyncio.Lock(), "Realtime": asyncio.Lock()}
        async with asyncio.TaskGroup() as group:
            for one in planned:
                await asyncio.sleep(max(0.0, began + one.after - asyncio.get_running_loop().time()))
                group.create_task(self._one(one, locks.get(one.kind.split()[0])), name=f"fault: {one.kind}")

    async def close(self) -> None:
        """End a stand-in of our own."""
        await self._standin.stop()

    async def _one(self, fault: Planned, lock: asyncio.Lock | None) -> None:
        if lock is None:
            await (self._listener if fault.kind.startswith("listener") else self._worker()).kill()
            return
        async with lock:
            match fault.kind:
                case "Redis flushed":
                    client = Redis.from_url(self._project.servers.redis.url)
                    await client.flushall()
                    await client.aclose()
                case "Redis restarted":
                    await self._project.servers.redis.kill()
                    await asyncio.sleep(fault.lasts / 2)
                    await self._project.servers.redis.start()
                case "Postgres restarted":
                    await self._project.servers.postgres.restart(immediate=True)
                case "Realtime killed":
                    await self._standin.stop()
                    await asyncio.sleep(fault.lasts)
                    await self._revive()
                case "Realtime silenced":
                    self._standin.faults.silent = True
                    await asyncio.sleep(fault.lasts)
                    self._standin.faults.silent = False
                case "Realtime drops":
                    self._standin.faults.drop = 0.1
                    await asyncio.sleep(fault.lasts)
                    self._standin.faults.drop = 0.0

    def _worker(self) -> Kept:
        return self._random.choice(self._workers)

    async def _revive(self) -> None:
        """Start a stand-in where the last one was; Postgres may be away just now."""
        while True:
            standin = Standin(
                self._project.database_url, jwt_secret=SECRET, port=self._port, poll_interval=0.005
            )
            try:
                await standin.start()
            except Exception:  # noqa: BLE001 - however it says that Postgres is away: it is tried again
                await standin.stop()
                await asyncio.sleep(0.1)
            else:
                self._standin = standin
                return
