"""One server process under a keeper, and free ports for it.

Not a process supervisor: nothing is restarted here; whoever owns a server restarts it.
"""

import asyncio
import os
import signal
import socket
import sys
from pathlib import Path

_KEEPER = Path(__file__).with_name("keeper.py")
_STOP_GRACE_SECONDS = 10.0


class ServerProcess:
    """A server that ends with its owner.

    Attributes:
        pid: process id of the server itself.
        ended: set once it has ended, however that came about.
        returncode: its exit code then; negative for a signal.
    """

    def __init__(self, keeper: asyncio.subprocess.Process, pid: int) -> None:
        self._keeper = keeper
        self.pid = pid
        self.ended = asyncio.Event()
        self.returncode: int | None = None
        self._watcher = asyncio.create_task(self._watch(), name=f"embedded server {pid}")

    @classmethod
    async def start(
        cls,
        command: list[str],
        *,
        log: Path,
        stop_signal: signal.Signals,
        cwd: Path | None = None,
        user: tuple[int, int] | None = None,
        environment: dict[str, str] | None = None,
    ) -> "ServerProcess":
        """Start `command` with its output appended to `log`; `user` is (uid, gid) to run as.

        Raises:
            OSError: if the program cannot be started.
        """
        uid, gid = user or (-1, -1)
        with log.open("ab") as output:
            keeper = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(_KEEPER),
                str(uid),
                str(gid),
                str(int(stop_signal)),
                str(_STOP_GRACE_SECONDS),
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )
        assert keeper.stdout is not None  # noqa: S101 - it was asked for above
        first = await keeper.stdout.readline()
        if not first:
            await keeper.wait()
            raise OSError(f"could not start {command[0]}; see {log}")
        return cls(keeper, int(first))

    async def _watch(self) -> None:
        assert self._keeper.stdout is not None  # noqa: S101 - as above
        line = await self._keeper.stdout.readline()
        self.returncode = int(line.split()[1]) if line else -int(signal.SIGKILL)
        await self._keeper.wait()
        self.ended.set()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server; one that has ended is left alone."""
        if self._keeper.stdin is not None and not self._keeper.stdin.is_closing():
            self._keeper.stdin.write(b"%d\n" % number)

    async def end(self, number: signal.Signals, *, grace: float = _STOP_GRACE_SECONDS) -> None:
        """Send a signal and wait for the end; after `grace` seconds, kill."""
        self.send(number)
        try:
            await asyncio.wait_for(self.ended.wait(), grace)
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self.ended.wait()
        await self._watcher
        if self._keeper.stdin is not None:
            self._keeper.stdin.close()


def free_port() -> int:
    """Return a TCP port that was free on loopback a moment ago; it may be taken again at any time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def tail(log: Path, lines: int = 5) -> str:
    """Return the last lines of a log on one line, for an error message."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return ""
    return " | ".join(line.strip() for line in text.splitlines()[-lines:])


def is_root() -> bool:
    """Tell whether we run as the user that Postgres refuses."""
    return hasattr(os, "geteuid") and os.geteuid() == 0
