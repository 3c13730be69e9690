"""The daemon's processes on servers of their own, as a benchmark needs them.

Postgres, Redis, the stand-in, listener and workers are processes apart, as in production. Postgres keeps the
time of each commit, which is how a benchmark learns when a derived row was there without asking all the time.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from examples.demo.database import Connection, connect, execute
from examples.demo.processes import Child, Children, DemoError
from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase

PYTHON: Final = (sys.executable, "-m")
QUEUE = "bench"
_LOOK_SECONDS = 0.1

ORDERS = """
create table public.orders (
  id          bigint generated always as identity primary key,
  customer_id bigint not null,
  status      text not null,
  amount      numeric(12,2) not null,
  created_at  timestamptz not null default now(),
  updated_at  timestamptz
);
create index on public.orders (customer_id);
alter table public.orders replica identity full;
alter publication supabase_realtime add table public.orders;
grant select on public.orders to service_role;
"""


@dataclass
class Stack:
    """What is running, and how to start more of it."""

    folder: Path
    database_url: str
    redis_url: str
    realtime_url: str
    service_role_key: str
    settings: dict[str, str]
    children: Children
    db: Connection
    standin: Child
    memory: dict[str, float] = field(default_factory=dict)
    """The most memory that any listener and any worker has had, in MiB (`VmHWM`)."""
    _ours: dict[Child, str] = field(default_factory=dict)
    _started: int = 0

    async def listener(self) -> Child:
        """Start the listener; returns when it reads."""
        child = await self._start("listener", [*PYTHON, "worker", "listen"])
        await child.said(lambda line: line if line.get("message") == "subscribed" else None)
        return child

    async def worker(self) -> Child:
        """Start a worker by the arq command; returns when it is ready to work."""
        child = await self._start("worker", [*PYTHON, "arq", "worker.jobs.WorkerSettings"])
        await child.said(lambda line: line if line.get("message") == "working" else None)
        return child

    async def workers(self, count: int) -> tuple[Child, ...]:
        """Start some workers at once."""
        return tuple(await asyncio.gather(*(self.worker() for _ in range(count))))

    async def _start(self, kind: str, command: list[str]) -> Child:
        # Each has a log of its own: what one has said is no sign that the next is ready.
        self._started += 1
        child = await self.children.start(f"{kind} {self._started}", command, self.settings)
        self._ours[child] = kind
        return child

    async def end(self, *children: Child) -> None:
        """End some, and note the memory of those that are ours."""
        for child in children:
            kind = self._ours.pop(child, None)
            if kind is not None and not child.ended:
                self.memory[kind] = max(self.memory.get(kind, 0.0), high_water(child))
        await asyncio.gather(*(child.end() for child in children))

    async def end_all(self) -> None:
        """End all of ours that still run."""
        await self.end(*self._ours)

    def setting(self, **settings: str) -> None:
        """Change settings of what is started from now on."""
        self.settings.update(settings)

    async def read_in_windows(self) -> None:
        """Have the log read as behind a pooler: the direct connection is one that may not replicate.

        To be called before the listener is started.
        """
        await self.db.execute("create role narrow login password 'narrow'")
        parts = urlsplit(self.database_url)
        place = parts.netloc.rpartition("@")[2]
        direct = urlunsplit(parts._replace(netloc=f"narrow:narrow@{place}"))
        self.settings["DATABASE_DIRECT_URL"] = direct

    async def until(self, query: str, value: int, *, seconds: float, children: tuple[Child, ...]) -> None:
        """Wait until a query gives at least a value: commits of other processes send no signal.

        Raises:
            DemoError: a child has ended, or the time is over.
        """
        deadline = time.monotonic() + seconds
        while (found := await self.db.fetchval(query)) is None or found < value:
            for child in children:
                if child.ended:
                    raise child.explained()
            if time.monotonic() > deadline:
                raise DemoError(
                    f"after {seconds:.0f} s {query!r} gives {found}, not {value}: see {self.folder}"
                )
            await asyncio.sleep(_LOOK_SECONDS)


@asynccontextmanager
async def stack(
    handlers: str, tables: str, settings: Mapping[str, str] | None = None, poll_interval: float = 0.02
) -> AsyncIterator[Stack]:
    """Start servers and stand-in with these tables and Tailrace's; listener and workers are the caller's.

    Args:
        handlers: value of HANDLERS.
        tables: SQL, run before the migrations.
        settings: further settings of listener and workers.
        poll_interval: of the stand-in, in seconds.
    """
    folder = Path(tempfile.mkdtemp(prefix="tailrace-benchmark-"))
    children = Children(folder)
    failed = True
    try:
        async with (
            EmbeddedPostgres(folder / "postgres", settings={"track_commit_timestamp": "on"}) as postgres,
            EmbeddedRedis(folder / "redis") as redis,
        ):
            url = postgres.dsn()
            await bootstrap_supabase(url)
            await execute(url, tables)
            db = await connect(url)
            running: Stack | None = None
            try:
                standin = await _standin(children, url, poll_interval)
                told = await standin.said(lambda line: line if "realtime_url" in line else None)
                chosen = _settings(told, url, redis.url) | {"HANDLERS": handlers} | dict(settings or {})
                migration = await children.start("migration", [*PYTHON, "worker", "migrate"], chosen)
                await migration.succeed()
                running = Stack(
                    folder=folder,
                    database_url=url,
                    redis_url=redis.url,
                    realtime_url=str(told["realtime_url"]),
                    service_role_key=str(told["service_role_key"]),
                    settings=chosen,
                    children=children,
                    db=db,
                    standin=standin,
                )
                yield running
            finally:
                if running is not None:
                    await running.end_all()
                await children.end()
                await db.close()
        failed = False
    finally:
        shutil.rmtree(folder / "postgres" / "cluster", ignore_errors=True)
        if not failed:  # the logs say why
            shutil.rmtree(folder, ignore_errors=True)


async def _standin(children: Children, database_url: str, poll_interval: float) -> Child:
    command = [*PYTHON, "standin", "--database-url", database_url, "--poll-interval", str(poll_interval)]
    return await children.start("stand-in", command)


def high_water(child: Child) -> float:
    """Read the most memory that a process has had, in MiB."""
    return _memory(child, "VmHWM:")


def resident(child: Child) -> float:
    """Read the memory that a process has now, in MiB."""
    return _memory(child, "VmRSS:")


def _memory(child: Child, name: str) -> float:
    try:
        lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)


def _settings(told: Mapping[str, Any], database_url: str, redis_url: str) -> dict[str, str]:
    return {
        "SUPABASE_URL": str(told["supabase_url"]),
        "SUPABASE_SERVICE_ROLE_KEY": str(told["service_role_key"]),
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "PORT": "0",
        "WORKER_QUEUE": QUEUE,
        "WORKER_DELIVERY": "plain",
        "WORKER_LOG_FORMAT": "json",
    }
