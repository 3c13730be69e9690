"""A real PgBouncer before a database."""

import asyncio
import os
import pwd
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg

from standin.embedded.process import free_port

_DEADLINE_SECONDS = 20.0
_SETTINGS = """
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = {address}
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
ignore_startup_parameters = extra_float_digits
"""


@asynccontextmanager
async def pooled(
    url: str, *, address: str = "127.0.0.1", port: int | None = None, size: int = 5, mode: str = "transaction"
) -> AsyncIterator[str]:
    """Run PgBouncer; gives the URL of the same database behind it.

    Args:
        url: of the database.
        address: of this machine's loopback network.
        port: one that is free if not given.
        size: connections to the database.
        mode: after what a client gives its connection back: "transaction" or "session".
    """
    parts = urlsplit(url)
    listen = port or free_port()
    written = _SETTINGS.format(
        host=parts.hostname,
        port=parts.port,
        user=parts.username,
        password=parts.password,
        address=address,
        listen=listen,
        size=size,
        mode=mode,
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = _write(Path(folder), written)
        command = ["pgbouncer", "-q", str(settings)]
        if os.geteuid() == 0:  # it refuses to run as root
            command[1:1] = ["-u", pwd.getpwnam("nobody").pw_name]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
        try:
            pooler = f"postgresql://{parts.username}@{address}:{listen}{parts.path}"
            await _until_it_answers(pooler)
            yield pooler
        finally:
            process.terminate()
            await process.wait()


def _write(folder: Path, written: str) -> Path:
    folder.chmod(0o755)
    settings = folder / "pgbouncer.ini"
    settings.write_text(written)
    return settings


async def _until_it_answers(url: str) -> None:
    async with asyncio.timeout(_DEADLINE_SECONDS):
        while True:
            try:
                connection = await asyncpg.connect(url, statement_cache_size=0)
            except OSError:
                await asyncio.sleep(0.05)  # it sends no signal when it listens
            else:
                await connection.close()
                return
