"""Forks listeners and workers from a process that has loaded everything: a start costs a tenth of the usual.

Nothing of them is changed but the event loop, whose tasks are watched (see stepping.py). The nursery takes
orders over a socket, runs no loop of its own, and takes its children with it when it ends.
"""

import asyncio
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import psutil
import uvloop

from tests.awaits.stepping import Point, Watch
from tests.forkserver import Signalled
from tests.stack import ROOT, Process

Role = Literal["listener", "worker"]
COMMANDS: dict[Role, list[str]] = {
    "listener": ["worker", "listen"],
    "worker": ["arq", "worker.jobs.WorkerSettings"],
}
_MOST_BYTES = 65_536
_PRELOADED = (
    "worker.runtime",
    "worker.jobs",
    "worker.cli.commands",
    "arq.cli",
    "arq.worker",
    "tests.awaits.tables",
)


CLOCKS = {
    "worker.backfill": {"QUIET_SECONDS": 0.3},
    "worker.draining.turns": {"SWEEP_SECONDS": 0.3, "LINGER_SECONDS": 0.5, "AWAY_SECONDS": 0.2},
    "worker.lease": {"RENEW_SECONDS": 0.3},
    "worker.listener": {"STANDBY_SECONDS": 0.2},
    "worker.reading.proven": {"ADVANCE_SECONDS": 0.3},
}
"""What happens every few seconds happens more often: a round is short, and is to see it all."""


# The nursery itself


def main() -> int:
    """Take orders until the other end of the socket is closed."""
    _load()
    orders = socket.socket(fileno=int(sys.argv[1]))
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    orders.send(b"{}")
    poll = select.poll()
    poll.register(orders, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if woken in ready:
            os.read(woken, 4096)
            _reap(orders, children)
        if orders.fileno() in ready:
            order, descriptors, _, _ = socket.recv_fds(orders, _MOST_BYTES, 2)
            if not order:
                break
            children.add(_fork(order, descriptors, orders, (woken, wake)))
    for pid in children:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return 0


def _load() -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    for name, clocks in CLOCKS.items():
        module = importlib.import_module(name)
        for clock, seconds in clocks.items():
            assert seconds < getattr(module, clock)
            setattr(module, clock, seconds)


def _fork(order: bytes, descriptors: Sequence[int], orders: socket.socket, own: Sequence[int]) -> int:
    """Make a child, which never returns from here; tell its number."""
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (orders.fileno(), *own):
            os.close(descriptor)
        _live(json.loads(order), *descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    orders.send(json.dumps({"born": pid}).encode())
    return pid


def _reap(orders: socket.socket, children: set[int]) -> None:
    for pid in list(children):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            children.remove(pid)
            with suppress(OSError):
                orders.send(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}).encode())


def _live(order: Mapping[str, Any], log: int, report: int) -> None:
    """Become a process of the project."""
    os.environ.clear()
    os.environ.update(order["environment"])
    os.dup2(log, 2)
    os.close(log)
    late = Path(order["late"]) if order["late"] else None
    watch = Watch(report, Point(*order["point"]) if order["point"] else None, late)
    run = uvloop.run
    uvloop.run = lambda main, **options: run(main, loop_factory=watch.loop, **options)
    uvloop.new_event_loop = watch.loop
    sys.argv = [*COMMANDS[order["role"]]]
    code = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter would do with it
        sys.excepthook(*sys.exc_info())
    finally:
        watch.counted()
        sys.stderr.flush()
        os._exit(code)


# Those who order


class Child(Signalled):
    """What `tests.stack.Process` needs of a process that somebody else is the parent of."""

    def __init__(self, log: asyncio.StreamReader, report: asyncio.StreamReader) -> None:
        self.born: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.pid = 0
        self.stderr = log
        self.returncode: int | None = None
        self.ended = asyncio.Event()
        self.struck = asyncio.Event()
        """It has been struck; without that it has ended by itself."""
        self.visits: dict[str, int] = {}
        """What it counted, once it has ended in good order."""
        self._reading = asyncio.create_task(self._read(report), name="test: report of a child")

    async def _read(self, report: asyncio.StreamReader) -> None:
        async for line in report:
            told = json.loads(line)
            if "struck" in told:
                self.struck.set()
            self.visits = told.get("visits", self.visits)

    async def wait(self) -> int:
        await self.ended.wait()
        await self._reading
        assert self.returncode is not None
        return self.returncode

    async def stopped(self) -> None:
        """Wait until it sleeps by a signal; the kernel tells that to nobody but its parent."""
        while psutil.Process(self.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.005)


class Born(Process):
    """A listener or worker out of the nursery."""

    child: Child


class Nursery:
    """The nursery, for those who order."""

    def __init__(self, process: asyncio.subprocess.Process, orders: socket.socket) -> None:
        self._process = process
        self._orders = orders
        self._children: dict[int, Child] = {}
        self._unborn: Child | None = None
        self._ready = asyncio.Event()
        self._lock = asyncio.Lock()
        self._reader = asyncio.create_task(self._read(), name="test: nursery")

    @classmethod
    async def open(cls) -> Self:
        """Start it; it has loaded everything when this returns."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)  # noqa: FBT003 - a socket's own
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.awaits.nursery",
            str(theirs.fileno()),
            cwd=ROOT,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        nursery = cls(process, ours)
        async with asyncio.timeout(120):
            await nursery._ready.wait()
        return nursery

    async def close(self) -> None:
        """End it and all that it has started."""
        for child in self._children.values():
            child.kill()
        self._orders.shutdown(socket.SHUT_RDWR)
        await self._process.wait()
        await self._reader
        self._orders.close()

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._orders, _MOST_BYTES):
            told = json.loads(data)
            self._ready.set()
            if "born" in told and self._unborn is not None:
                # At once: the next thing that is heard of it may be its end.
                self._unborn.pid = told["born"]
                self._children[told["born"]] = self._unborn
                self._unborn.born.set_result(told["born"])
            if "ended" in told:
                child = self._children.pop(told["ended"])
                child.returncode = told["code"]
                child.ended.set()

    async def start(
        self,
        role: Role,
        environment: Mapping[str, str],
        point: Point | None = None,
        late: Path | None = None,
    ) -> Born:
        """Start a process; with a point, it is struck there (see `Watch` for `late`)."""
        log, log_end = await _pipe()
        report, report_end = await _pipe()
        what = {"role": role, "environment": dict(environment), "point": point}
        order = json.dumps(what | {"late": str(late) if late else None}).encode()
        async with self._lock:
            self._unborn = child = Child(log, report)
            socket.send_fds(self._orders, [order], [log_end, report_end])
            await child.born
        os.close(log_end)
        os.close(report_end)
        born = Born(child, role)  # type: ignore[arg-type] # it has what a process needs to have
        born.child = child
        return born


async def _pipe() -> tuple[asyncio.StreamReader, int]:
    loop = asyncio.get_running_loop()
    end, other = os.pipe()
    reader = asyncio.StreamReader(limit=2**20)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(end, "rb"))
    return reader, other


if __name__ == "__main__":
    raise SystemExit(main())
