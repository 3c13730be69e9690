"""Starts `python -m worker …` and `python -m arq …` by forking a process that has loaded them.

Loading is nine tenths of what a start costs, and tests start hundreds of processes. A child has the
arguments, environment, directory and streams that it was ordered with, and runs the module as `python -m`
does; only its imports were made before. What a fork would not show is started anew: see `forks`. That a fresh
interpreter starts, too, is seen by the tests of the demo, the Procfile, the console script and projects
elsewhere.

The server takes orders over a socket, one datagram each, with the descriptors of the child's output and of
its report: there it writes the child's number, and later its exit code. It ends with whoever opened it, and
takes its children along.
"""

import asyncio
import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
_MODULES = ("worker", "arq")
_PRELOADED = (
    "alembic.command",
    "arq.cli",
    "arq.worker",
    "uvicorn",
    "worker.cli.app",
    "worker.cli.commands",
    "worker.jobs",
    "worker.runtime",
)
_MOST_BYTES = 65_536
_DESCRIPTORS = 4
_START_SECONDS = 120
_OF_THE_INTERPRETER = ("PYTHON", "LD_", "LC_", "MALLOC_", "GLIBC_")
"""Variables that are read before any code of ours runs: a fork has those of the server."""
_OWN = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


# The server itself


def main() -> int:
    """Take orders until the other end of the socket is closed."""
    for name in _PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or each child's first collection would copy every page
    orders = socket.socket(fileno=int(sys.argv[1]))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reports: dict[int, int] = {}
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if woken in ready:
            os.read(woken, 4096)
            _reap(reports)
        if orders.fileno() in ready:
            order, given, _, _ = socket.recv_fds(orders, _MOST_BYTES, _DESCRIPTORS)
            if not order:
                break
            *streams, report = given
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for descriptor in (orders.detach(), woken, wake, report, *reports.values()):
                    os.close(descriptor)
                _live(json.loads(order), streams)
            for descriptor in streams:
                os.close(descriptor)
            reports[pid] = report
            _tell(report, pid)
    for pid in reports:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return 0


def _reap(reports: dict[int, int]) -> None:
    for pid in list(reports):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            report = reports.pop(pid)
            _tell(report, os.waitstatus_to_exitcode(status))
            os.close(report)


def _tell(report: int, number: int) -> None:
    # Who ordered it may be gone already.
    with contextlib.suppress(BrokenPipeError):
        os.write(report, b"%d\n" % number)


def _live(order: Mapping[str, Any], streams: Sequence[int]) -> NoReturn:
    """Become the process that was ordered."""
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["directory"])
    # The directory that `-m` adds, and those of PYTHONPATH, of which the server has one.
    sys.path[:2] = [order["directory"], *order["environment"]["PYTHONPATH"].split(os.pathsep)]
    sys.argv = list(order["arguments"])
    code = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            sys.stderr.write(f"{left.code}\n")
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - what the interpreter would do with it
        sys.excepthook(*sys.exc_info())
    finally:
        # As an interpreter ends: a thread that does not would hold it up.
        threading._shutdown()  # type: ignore[attr-defined] # what the interpreter calls
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


# Those who order


class Signalled:
    """A process that somebody else is the parent of: nobody tells of its end but that one."""

    pid: int
    returncode: int | None

    def send_signal(self, number: int) -> None:
        """Send a signal; one that has ended is left alone."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Child(Signalled):
    """What is used of an asyncio subprocess, of a process that somebody else is the parent of."""

    def __init__(self, pid: int, report: asyncio.StreamReader, output: asyncio.StreamReader) -> None:
        self.pid = pid
        self.stdout = self.stderr = output
        self.returncode: int | None = None
        self._report = report
        self._watch = asyncio.create_task(self._end(), name=f"end of {pid}")

    async def _end(self) -> int:
        told = await self._report.readline()
        self.returncode = int(told) if told else -int(signal.SIGKILL)
        return self.returncode

    async def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        return await asyncio.shield(self._watch)


def forks(command: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Tell whether a command is one of those that can be forked, and would be the same.

    It is not where variables are for the interpreter itself, or for the time zone of the process.
    """
    if sys.platform != "linux" or command[0] != sys.executable or command[1] != "-m":
        return False
    special = {
        name: value
        for name, value in environment.items()
        if name.startswith(_OF_THE_INTERPRETER) or name in ("TZ", "LANG")
    }
    ours, *_ = special.pop("PYTHONPATH", "").split(os.pathsep)
    return command[2] in _MODULES and ours == str(ROOT) and special.items() <= _OWN.items()


async def start(
    command: Sequence[str], environment: Mapping[str, str], directory: Path, *, merged: bool = False
) -> Child:
    """Fork a command that `forks`; its errors can be read, and with `merged` what it prints, among them."""
    output, end = await _pipe()
    report, told = await _pipe()
    with open(os.devnull, "r+b", buffering=0) as nothing:  # noqa: ASYNC230, PTH123 - no file that waits
        streams = (nothing.fileno(), end if merged else nothing.fileno(), end)
        _order(command, environment, directory, (*streams, told))
    os.close(end)
    os.close(told)
    born = await report.readline()
    if not born:
        raise RuntimeError("the server of the tests that forks processes has ended")
    return Child(int(born), report, output)


def run(
    command: Sequence[str], environment: Mapping[str, str], directory: Path, *, seconds: float = 120
) -> "subprocess.CompletedProcess[str]":
    """Fork a command that `forks`, and wait for its end, as `subprocess.run` does."""
    reading, told = os.pipe()
    with (
        tempfile.TemporaryFile("w+") as output,
        tempfile.TemporaryFile("w+") as errors,
        open(os.devnull, "rb") as nothing,  # noqa: PTH123 - as above
        os.fdopen(reading, "rb", buffering=0) as report,
    ):
        _order(command, environment, directory, (nothing.fileno(), output.fileno(), errors.fileno(), told))
        os.close(told)
        text = b""
        while text.count(b"\n") < 2:
            if not select.select([report], [], [], seconds)[0]:
                raise subprocess.TimeoutExpired(list(command), seconds)
            news = report.read(64)
            if not news:
                raise RuntimeError("the server of the tests that forks processes has ended")
            text += news
        output.seek(0)
        errors.seek(0)
        code = int(text.split()[1])
        return subprocess.CompletedProcess(list(command), code, output.read(), errors.read())


def _order(
    command: Sequence[str], environment: Mapping[str, str], directory: Path, descriptors: Sequence[int]
) -> None:
    what = {"arguments": command[2:], "environment": dict(environment), "directory": str(directory)}
    socket.send_fds(_server(), [json.dumps(what).encode()], list(descriptors))


@functools.cache
def _server() -> socket.socket:
    """Start the server, once a process; orders wait until it has loaded everything."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], **_OWN},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )

    def close() -> None:
        ours.close()
        process.wait(_START_SECONDS)

    atexit.register(close)
    return ours


async def _pipe() -> tuple[asyncio.StreamReader, int]:
    end, other = os.pipe()
    reader = asyncio.StreamReader(limit=2**20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(end, "rb"))
    return reader, other


if __name__ == "__main__":
    raise SystemExit(main())
