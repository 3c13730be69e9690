"""A Supabase project of a test's own, and tailrace's processes on it, all real.

Databases are cloned from a template with tailrace's tables in it; queues have names of their own, so that one
Postgres and one Redis serve all tests that do not kill them. Log lines of the processes are the signals that
tests wait for.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx

from config.settings import Settings
from standin import Behaviour, Standin
from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase
from tests import forkserver
from tests.leaks import written

ROOT = Path(__file__).parent.parent
SECRET = "the secret of these tests, long enough for HS256"
DEADLINE_SECONDS = 30.0
_TEMPLATE = "tailrace_template"
_numbers = itertools.count(1)
# Held weakly, and not by id(): a server that is gone leaves its number to the next one.
_template_made: weakref.WeakSet[EmbeddedPostgres] = weakref.WeakSet()


@dataclass
class Servers:
    """One Postgres and one Redis."""

    postgres: EmbeddedPostgres
    redis: EmbeddedRedis


@asynccontextmanager
async def servers(folder: Path, **postgres: object) -> AsyncIterator[Servers]:
    """Run both."""
    async with (
        EmbeddedPostgres(folder / "postgres", settings=postgres) as database,
        EmbeddedRedis(folder / "redis") as redis,
    ):
        yield Servers(database, redis)


class Relay:
    """A way to a server that can be cut: its port refuses connections until it is open, and when it is cut.

    The port stays the same all the time: a second socket, bound and never listening, keeps it.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(("127.0.0.1", 0))
        self._server: asyncio.Server | None = None
        self._ways: dict[asyncio.StreamWriter, asyncio.Task[None] | None] = {}
        port = self._kept.getsockname()[1]
        user, at, _ = self._parts.netloc.rpartition("@")
        self.url = urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{port}"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cut()
        self._kept.close()

    async def open(self) -> None:
        """Let connections through."""
        host, port = self._kept.getsockname()
        self._server = await asyncio.start_server(self._through, host, port, reuse_address=True)

    async def cut(self) -> None:
        """Refuse connections, and break those that are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        ways = dict(self._ways)
        for writer in ways:
            writer.transport.abort()
        await asyncio.gather(*(way for way in ways.values() if way is not None), return_exceptions=True)

    async def _through(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._ways[writer] = asyncio.current_task()
        try:
            far = await asyncio.open_connection(self._parts.hostname, self._parts.port)
            self._ways[far[1]] = None
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(_pump(reader, far[1]), name="test: to the server")
                    group.create_task(_pump(far[0], writer), name="test: from the server")
            finally:
                far[1].transport.abort()
                del self._ways[far[1]]
        except* (OSError, EOFError):
            pass
        finally:
            writer.transport.abort()
            del self._ways[writer]


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    raise EOFError


class Process:
    """One of tailrace's processes: its log lines, its end."""

    def __init__(self, process: asyncio.subprocess.Process | forkserver.Child, name: str) -> None:
        self.process = process
        self.name = name
        self.lines: list[dict[str, Any]] = []
        self._news = asyncio.Condition()
        self._reader = asyncio.create_task(self._read(), name=f"test: log of {name}")

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str], name: str) -> Self:
        """Start a command with exactly this environment."""
        written.given(environment)
        if forkserver.forks(command, environment):
            return cls(await forkserver.start(command, environment, ROOT), name)
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            env=dict(environment),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            limit=2**20,
        )
        return cls(process, name)

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            text = raw.decode(errors="replace").rstrip()
            written.heard(self.name, text)
            try:
                line = json.loads(text)
            except ValueError:
                line = {"message": text}
            async with self._news:
                self.lines.append(line if isinstance(line, dict) else {"message": text})
                self._news.notify_all()
        async with self._news:
            self._news.notify_all()

    async def said(self, event: str, *, times: int = 1, seconds: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """Wait until a line with this event has been logged so many times; returns the last of them."""

        def found() -> list[dict[str, Any]]:
            return [line for line in self.lines if event in str(line.get("message", ""))]

        async with asyncio.timeout(seconds), self._news:
            await self._news.wait_for(lambda: len(found()) >= times or self._reader.done())
        assert len(found()) >= times, f"{self.name} ended without saying {event!r}: {self.lines[-15:]}"
        return found()[times - 1]

    async def ended(self, seconds: float = DEADLINE_SECONDS) -> int:
        """Wait for its end; returns the exit code."""
        try:
            async with asyncio.timeout(seconds):
                code = await self.process.wait()
                await self._reader
        except TimeoutError:
            raise AssertionError(f"{self.name} does not end: {self.lines[-15:]}") from None
        return code

    async def terminate(self) -> int:
        """Send SIGTERM and wait; returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await self.ended()

    async def kill(self) -> None:
        """Send SIGKILL."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.ended()

    @property
    def text(self) -> str:
        """All it has logged."""
        return "\n".join(json.dumps(line) for line in self.lines)


@dataclass
class Project:
    """A project with its own database and stand-in."""

    servers: Servers
    database_url: str
    standin: Standin
    db: asyncpg.Connection
    environment: dict[str, str]
    processes: list[Process] = field(default_factory=list)

    @property
    def settings(self) -> Settings:
        """The settings that its processes read."""
        names = {name: value for name, value in self.environment.items() if name.isupper()}
        with only_environment(names):
            return Settings(_env_file=None)  # type: ignore[call-arg] # as config.settings does

    async def start(self, *command: str, name: str, **environment: str) -> Process:
        """Start a process of the project."""
        process = await Process.start(command, self.environment | environment, name)
        self.processes.append(process)
        return process

    async def listener(self, *, wait: bool = True, **environment: str) -> Process:
        """Start a listener; by default wait until it is subscribed."""
        process = await self.start(sys.executable, "-m", "worker", "listen", name="listener", **environment)
        if wait:
            await process.said("subscribed")
        return process

    async def worker(self, *, wait: bool = True, **environment: str) -> Process:
        """Start a worker by the arq command; by default wait until it works."""
        command = [sys.executable, "-m", "arq", "worker.jobs.WorkerSettings"]
        process = await self.start(*command, name="worker", **environment)
        if wait:
            await process.said("working")
        return process

    async def run(self, *command: str, **environment: str) -> tuple[int, str]:
        """Run `python -m worker …` to its end; returns exit code and what it printed to both."""
        given = self.environment | environment
        code, output = await _run(command, given)
        written.given(given)
        written.heard(f"python -m worker {' '.join(command)}", output)
        return code, output

    async def get(self, listener: Process, path: str) -> httpx.Response:
        """Ask a process over HTTP."""
        said = await listener.said("health of the")
        async with httpx.AsyncClient() as client:
            return await client.get(f"{said['url']}{path}", timeout=10)

    async def reconnect(self) -> None:
        """Connect anew after the database was restarted."""
        self.db.terminate()
        self.db = await asyncpg.connect(self.database_url)

    async def kill_all(self, slot: str) -> None:
        """Kill its processes and drop its slot, which would keep the log of a server that others use, too."""
        for process in self.processes:
            await process.kill()
        of_slot = f"from pg_replication_slots where slot_name = '{slot}'"
        await self.until(f"select count(*) {of_slot} and active", 0)
        await self.db.execute(f"select pg_drop_replication_slot(slot_name) {of_slot}")

    async def until(self, query: str, value: object, seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until a query gives a value: commits of other processes send no signal."""
        deadline = time.monotonic() + seconds
        while (found := await self.db.fetchval(query)) != value:
            if time.monotonic() > deadline:
                logs = "\n".join(f"{one.name}: {one.lines[-5:]}" for one in self.processes)
                raise AssertionError(f"{query} gives {found!r}, not {value!r}\n{logs}")
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def only_environment(names: Mapping[str, str]) -> Iterator[None]:
    """Have this environment, and no other, for a while."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(names)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


async def execute(url: str, statement: str) -> None:
    """Run a statement on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def _template(postgres: EmbeddedPostgres) -> None:
    """Make the template once a server: an empty Supabase project with tailrace's tables."""
    if postgres in _template_made:
        return
    await execute(postgres.dsn(), f"create database {_TEMPLATE}")
    url = postgres.dsn(_TEMPLATE)
    await bootstrap_supabase(url)
    code, output = await _run(("migrate",), _settings(url, "redis://127.0.0.1:1", "x", "y"))
    assert code == 0, output
    _template_made.add(postgres)


async def _run(command: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run `python -m worker …`; returns exit code and what it printed to both."""
    command = [sys.executable, "-m", "worker", *command]
    process: asyncio.subprocess.Process | forkserver.Child
    async with asyncio.timeout(DEADLINE_SECONDS):
        if forkserver.forks(command, environment):
            process = await forkserver.start(command, environment, ROOT, merged=True)
        else:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=ROOT,
                env=dict(environment),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        assert process.stdout is not None
        output = await process.stdout.read()
        return await process.wait(), output.decode()


def _settings(database_url: str, redis_url: str, supabase_url: str, handlers: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "SUPABASE_URL": supabase_url if "://" in supabase_url else "http://127.0.0.1:9",
        "SUPABASE_SERVICE_ROLE_KEY": "sb_secret_of_nobody",
        "DATABASE_URL": database_url,
        "REDIS_URL": redis_url,
        "HANDLERS": handlers,
        "PORT": "0",
        "WORKER_LOG_FORMAT": "json",
        "WORKER_LOG_LEVEL": "info",
        "WORKER_QUEUE": f"test{next(_numbers)}",
        "WORKER_CANARY_SECONDS": "1",
        # A slot belongs to the whole server, which projects share: who wants proven delivery says so.
        "WORKER_DELIVERY": "plain",
    }


@asynccontextmanager
async def project(
    servers: Servers,
    tables: str,
    handlers: str,
    *,
    behaviour: Behaviour | None = None,
    poll_interval: float = 0.005,
    **settings: str,
) -> AsyncIterator[Project]:
    """Make a project.

    Args:
        servers: where.
        tables: SQL that makes its tables; all of public are published, but those named `derived_…`.
        handlers: value of HANDLERS.
        behaviour: of the stand-in.
        poll_interval: of the stand-in, in seconds.
        settings: further environment.
    """
    postgres = servers.postgres
    await _template(postgres)
    name = f"project_{next(_numbers)}"
    await execute(postgres.dsn(), f"create database {name} template {_TEMPLATE}")
    url = postgres.dsn(name)
    db = await asyncpg.connect(url)
    await db.execute(tables)
    published = await db.fetch(
        "select format('%I.%I', schemaname, tablename) from pg_tables"
        " where schemaname = 'public' and tablename not like 'derived\\_%'"
    )
    for row in published:
        await db.execute(f"alter publication supabase_realtime add table {row[0]}")
    async with Standin(url, jwt_secret=SECRET, behaviour=behaviour, poll_interval=poll_interval) as standin:
        environment = _settings(url, servers.redis.url, standin.supabase_url, handlers)
        environment |= {"SUPABASE_SERVICE_ROLE_KEY": standin.service_role_key} | settings
        made = Project(servers, url, standin, db, environment)
        try:
            yield made
        finally:
            for process in reversed(made.processes):
                await process.kill()
            await made.db.close()
    await execute(postgres.dsn(), f"drop database {name} with (force)")
