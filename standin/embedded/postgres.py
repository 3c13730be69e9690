"""An embedded PostgreSQL 18: one cluster in one directory, on loopback, with password authentication.

Not a database for production: by default it does not wait for the disk.
"""

import asyncio
import hashlib
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self
from urllib.parse import quote

import asyncpg

from standin.embedded import binaries
from standin.embedded.process import ServerProcess, free_port, tail

PASSWORD = "postgres"  # noqa: S105 - a throw-away cluster on loopback, the same as in local Supabase
_START_SECONDS = 60.0
_PORT_ATTEMPTS = 10
_TEMPLATE_FORMAT = "1"
_CLUSTER = "cluster"

_SETTINGS: dict[str, object] = {
    "listen_addresses": "127.0.0.1",
    # Paths of sockets are limited to about 100 bytes; TCP has no such trap.
    "unix_socket_directories": "",
    "wal_level": "logical",
    "max_replication_slots": 100,
    "max_wal_senders": 100,
    "max_connections": 300,
    "max_logical_replication_workers": 0,
    "shared_buffers": "64MB",
    "max_wal_size": "1GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "password_encryption": "scram-sha-256",
}
# Commits stay synchronous: logical decoding sees a change only when its log is written, which an
# asynchronous commit leaves to a process that wakes up five times a second.
_NOT_DURABLE: dict[str, object] = {"fsync": "off", "full_page_writes": "off"}


class EmbeddedPostgres:
    """A PostgreSQL server of our own.

    Args:
        data_dir: directory for the cluster and its log; made if missing. A cluster found there is used.
        port: TCP port, or None for one that is free. It stays the same over restarts.
        settings: server settings beyond ours.
        durable: wait for the disk at each commit, so that commits survive the death of the machine.
            The commits of a server that was killed survive either way.
    """

    def __init__(
        self,
        data_dir: Path | str,
        *,
        port: int | None = None,
        settings: Mapping[str, object] | None = None,
        durable: bool = False,
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._cluster = self.data_dir / _CLUSTER
        self._log = self.data_dir / "postgres.log"
        self._wanted_port = port
        self._port = port or 0
        self._settings = {**_SETTINGS, **({} if durable else _NOT_DURABLE), **(settings or {})}
        self._process: ServerProcess | None = None
        self._user = binaries.server_user()

    @property
    def port(self) -> int:
        """The TCP port; 0 before the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of the postmaster, or None while it is not running."""
        running = self._process is not None and not self._process.ended.is_set()
        return self._process.pid if running and self._process else None

    def dsn(self, database: str = "postgres", *, user: str = "postgres", password: str = PASSWORD) -> str:
        """Return the URL of a database of this server."""
        return (
            f"postgresql://{quote(user, safe='')}:{quote(password, safe='')}"
            f"@127.0.0.1:{self._port}/{quote(database, safe='')}"
        )

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server and return when it takes connections.

        Raises:
            RuntimeError: if it does not start; the message carries the end of its log.
        """
        if self.pid is not None:
            raise RuntimeError("the embedded Postgres is already running")
        await asyncio.to_thread(self._prepare)
        program = await asyncio.to_thread(binaries.postgres_bin)
        for attempt in range(_PORT_ATTEMPTS):
            if not self._port:
                self._port = free_port()
            if await self._start_once(program):
                return
            end = tail(self._log, 10)
            if attempt < _PORT_ATTEMPTS - 1 and "still in use" in end:
                # The children of a killed postmaster take a moment to notice.
                await asyncio.sleep(0.1)
            elif attempt < _PORT_ATTEMPTS - 1 and "could not bind" in end and not self._wanted_port:
                self._port = 0
            else:
                raise RuntimeError(f"the embedded Postgres did not start: {tail(self._log)}")

    async def _start_once(self, program: Path) -> bool:
        # The name tells our server from another one that took the port before it.
        name = secrets.token_hex(8)
        settings = {**self._settings, "port": self._port, "cluster_name": name}
        command = [str(program / "postgres"), "-D", self._reachable_cluster()]
        for setting, value in settings.items():
            command += ["-c", f"{setting}={value}"]
        # SIGQUIT is the immediate shutdown: the server ends its own children.
        process = await ServerProcess.start(
            command,
            log=self._log,
            stop_signal=signal.SIGQUIT,
            cwd=self._cluster,
            user=self._user,
            environment=_environment(),
        )
        self._process = process
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while not process.ended.is_set():
            if await self._answers(name):
                return True
            if asyncio.get_running_loop().time() > deadline:
                await process.end(signal.SIGQUIT)
                raise RuntimeError(f"the embedded Postgres is not ready after {_START_SECONDS:.0f} s")
            # There is no signal for "ready" that a starting server would send us.
            await asyncio.sleep(0.03)
        await process.end(signal.SIGQUIT)
        self._process = None
        return False

    async def _answers(self, name: str) -> bool:
        try:
            connection = await asyncpg.connect(self.dsn(), timeout=5)
        except (OSError, TimeoutError, asyncpg.PostgresError):
            return False
        try:
            return bool(await connection.fetchval("show cluster_name") == name)
        finally:
            await connection.close()

    async def stop(self) -> None:
        """End the server in an orderly way (fast shutdown); does nothing if it is not running."""
        await self._end(signal.SIGINT)

    async def kill(self) -> None:
        """Kill the postmaster with SIGKILL, as a crash of the machine would."""
        await self._end(signal.SIGKILL)

    async def restart(self, *, immediate: bool = False) -> None:
        """End the server (with `immediate`, without a checkpoint, as in a crash) and start it again."""
        await self._end(signal.SIGQUIT if immediate else signal.SIGINT)
        await self.start()

    async def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            await self._process.end(number)
            self._process = None

    # A user that Postgres may run as need not be able to walk down to our directory, but it
    # may use one it is already in: `cwd` is opened for it before the change of user.
    def _reachable_cluster(self) -> str:
        return "/proc/self/cwd" if self._user and sys.platform == "linux" else str(self._cluster)

    def _prepare(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if (self._cluster / "PG_VERSION").exists():
            return
        draft = Path(tempfile.mkdtemp(prefix="draft-", dir=self.data_dir))
        shutil.copytree(_template(), draft, symlinks=True, dirs_exist_ok=True)
        _give(draft, self._user)
        draft.rename(self._cluster)


def _environment() -> dict[str, str]:
    # Neither PG* variables nor a locale of the caller may reach the server.
    return {"PATH": os.environ.get("PATH", ""), "LC_ALL": "C", "TZ": "UTC"}


def _give(directory: Path, user: tuple[int, int] | None) -> None:
    directory.chmod(0o700)
    if user is not None:
        for root, _, files in os.walk(directory):
            os.chown(root, *user)
            for name in files:
                os.chown(Path(root) / name, *user, follow_symlinks=False)


def _template() -> Path:
    """Return a freshly initialised cluster to copy; `initdb` takes seconds, a copy tenths of one."""
    programs = binaries.postgres_bin()
    mark = f"{_TEMPLATE_FORMAT}:{programs}:{(programs / 'postgres').stat().st_mtime_ns}"
    target = _cache_directory() / f"cluster-{hashlib.sha256(mark.encode()).hexdigest()[:16]}"
    if target.exists():
        return target
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=target.parent))
    _initialise(programs, draft)
    binaries.publish(draft, target)
    return target


def _initialise(programs: Path, directory: Path) -> None:
    user = binaries.server_user()
    _give(directory, user)
    reachable = "/proc/self/cwd" if user and sys.platform == "linux" else str(directory)
    # The password is no secret, and the other user must be able to read it.
    with tempfile.NamedTemporaryFile("w", dir=binaries.shared_directory()) as password:
        password.write(PASSWORD + "\n")
        password.flush()
        Path(password.name).chmod(0o644)
        command = [str(programs / "initdb"), "-D", reachable, "--username=postgres", "--no-locale"]
        command += ["--auth=scram-sha-256", "--encoding=UTF8", "--no-sync", "--no-instructions"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", f"--pwfile={password.name}"]
        done = subprocess.run(  # noqa: S603 - our own command
            command,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            capture_output=True,
            text=True,
            check=False,
            user=user[0] if user else None,
            group=user[1] if user else None,
            extra_groups=[] if user else None,
        )
    if done.returncode:
        shutil.rmtree(directory, ignore_errors=True)
        raise RuntimeError(f"initdb failed: {' '.join((done.stdout + done.stderr).split())}")


def _cache_directory() -> Path:
    """Return a directory of ours alone that outlives the process; the temporary one if there is no home."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        directory = base / "tailrace" / "embedded"
        # A home that does not exist is not for us to make.
        if not base.parent.is_dir():
            return binaries.shared_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.lstat()
        private = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if private and os.access(directory, os.W_OK):
            return directory
    except (OSError, RuntimeError):
        pass
    return binaries.shared_directory()
