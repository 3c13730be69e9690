"""What a service manager hears: that a process is up, gets on, is stuck, ends; and what counts as stuck."""

import asyncio
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.supervisor import Supervisor, read_supervisor
from worker import supervision
from worker.pulse import Pulse, beat
from worker.supervision import attend, end


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Told:
    def __init__(self) -> None:
        self.stuck: list[str] = []
        self.words = ""

    def live(self) -> tuple[bool, list[str]]:
        return not self.stuck, self.stuck

    def doing(self) -> str:
        return self.words


class Manager:
    """The other end of the socket."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(0)

    def close(self) -> None:
        self._socket.close()

    async def hears(self) -> list[str]:
        async with asyncio.timeout(10):
            heard = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
        return heard.decode().split("\n")


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "LOOK_SECONDS", 0.01)


async def test_ready_is_said_once_and_the_watchdog_hears_of_progress_alone(manager: Manager) -> None:
    told = Told()
    reports = asyncio.create_task(attend(Supervisor(manager.address, 60.0), told))
    assert await manager.hears() == ["WATCHDOG=1"]
    told.words = "waiting: Postgres cannot be reached"
    while (heard := await manager.hears()) == ["WATCHDOG=1"]:
        pass
    assert heard == ["READY=1", "STATUS=waiting: Postgres cannot be reached", "WATCHDOG=1"]
    told.stuck = ["a pass over shop:3 has not got on for 91 s"]
    while (heard := await manager.hears()) == ["WATCHDOG=1"]:
        pass
    assert heard == ["STATUS=stuck: a pass over shop:3 has not got on for 91 s"]
    told.stuck, told.words = [], "draining 1 lanes"
    assert await manager.hears() == ["STATUS=draining 1 lanes", "WATCHDOG=1"]
    await end(reports)
    while (heard := await manager.hears()) == ["WATCHDOG=1"]:
        pass
    assert heard == ["STOPPING=1", "STATUS=stopping"]


async def test_where_nobody_listens_nothing_is_said() -> None:
    await attend(Supervisor(None, None), Told())


async def test_a_manager_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    reports = asyncio.create_task(attend(Supervisor(str(tmp_path / "nobody"), 1.0), Told()))
    done, _ = await asyncio.wait({reports}, timeout=0.1)
    assert not done
    await end(reports)


async def test_an_abstract_socket_is_found() -> None:
    name = f"tailrace-{threading.get_native_id()}-notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(f"\0{name}")
        bound.settimeout(0)
        reports = asyncio.create_task(attend(Supervisor(f"@{name}", None), Told()))
        async with asyncio.timeout(10):
            assert await asyncio.get_running_loop().sock_recv(bound, 100) == b"WATCHDOG=1"
        await end(reports)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (None, None)),
        ({"NOTIFY_SOCKET": "/run/notify"}, ("/run/notify", None)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "7"}, ("@x", 90.0)),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "90000000", "WATCHDOG_PID": "8"}, ("@x", None)),
        ({"NOTIFY_SOCKET": "vsock:2:1", "WATCHDOG_USEC": "1"}, (None, None)),
        ({"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "soon"}, ("/run/notify", None)),
    ],
    ids=["none", "no watchdog", "watchdog", "of another process", "no socket of Unix", "no number"],
)
def test_the_environment_of_systemd(environment: dict[str, str], expected: object) -> None:
    assert read_supervisor(environment, pid=7) == expected


async def test_work_that_says_nothing_is_stuck_and_work_that_gets_on_is_not() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    with pulse.working("a pass", 30):
        clock.now += 29
        assert pulse.stuck() == []
        beat()
        clock.now += 30
        assert pulse.stuck() == []
        clock.now += 1
        assert pulse.stuck() == ["a pass has not got on for 31 s"]
    assert pulse.stuck() == []


async def test_each_work_has_a_beat_of_its_own_and_its_tasks_beat_for_it() -> None:
    clock = Clock()
    pulse = Pulse(clock)
    go, ended = asyncio.Event(), asyncio.Event()

    async def hangs() -> None:
        with pulse.working("one", 30):
            await ended.wait()

    async def gets_on() -> None:
        with pulse.working("another", 30):
            await go.wait()

            async def call() -> None:
                beat()

            await asyncio.create_task(call())
            await ended.wait()

    async with asyncio.TaskGroup() as group:
        group.create_task(hangs())
        group.create_task(gets_on())
        await asyncio.sleep(0)
        clock.now += 31
        assert len(pulse.stuck()) == 2
        go.set()
        while len(pulse.stuck()) > 1:
            await asyncio.sleep(0)
        assert pulse.stuck() == ["one has not got on for 31 s"]
        ended.set()


def test_a_beat_outside_of_work_is_nothing() -> None:
    beat()
