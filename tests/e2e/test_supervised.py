"""Both processes under a manager that speaks systemd's protocol, and under the probes of a platform."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import Process, Project, Relay


class Manager:
    """Hears what a process reports, as systemd would."""

    def __init__(self, path: Path) -> None:
        self.environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "2000000"}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0)

    def close(self) -> None:
        self._socket.close()

    async def hears(self, word: str) -> list[str]:
        """Everything up to a report with this beginning of a line."""
        heard: list[str] = []
        async with asyncio.timeout(30):
            while not any(line.startswith(word) for line in heard):
                report = await asyncio.get_running_loop().sock_recv(self._socket, 4096)
                heard += report.decode().split("\n")
        return heard


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


async def test_a_listener_reports_that_it_reads_and_that_it_ends(shop: Project, manager: Manager) -> None:
    listener = await shop.listener(**manager.environment)
    heard = await manager.hears("STATUS=reading, plain delivery")
    assert heard.count("READY=1") == 1
    assert "WATCHDOG=1" in await manager.hears("WATCHDOG=1")
    assert await listener.terminate() == 0
    assert (await manager.hears("STOPPING=1")).count("READY=1") == 0


async def test_a_stand_by_is_up_and_serves_though_not_every_commit_is_its_own(
    shop: Project, manager: Manager
) -> None:
    await shop.listener()
    second = await shop.listener(wait=False, **manager.environment)
    assert "READY=1" in await manager.hears("STATUS=standing by")
    assert (await shop.get(second, "/readyz")).status_code == 503
    assert (await shop.get(second, "/readyz?standby=ok")).status_code == 200
    assert (await shop.get(second, "/livez")).status_code == 200


async def test_a_worker_reports_that_it_works_and_that_it_ends(shop: Project, manager: Manager) -> None:
    worker = await shop.worker(**manager.environment)
    assert (await manager.hears("STATUS=idle")).count("READY=1") == 1
    assert "WATCHDOG=1" in await manager.hears("WATCHDOG=1")
    assert await worker.terminate() == 0
    assert "STATUS=stopping" in await manager.hears("STOPPING=1")


@pytest.mark.parametrize("away", ["DATABASE_URL", "REDIS_URL"])
async def test_a_worker_that_waits_is_up_and_live_but_not_ready(
    shop: Project, manager: Manager, away: str
) -> None:
    async with Relay(shop.environment[away]) as way:
        environment = {**manager.environment, away: way.url, "WORKER_HEALTH_PORT": "0"}
        worker: Process = await shop.worker(wait=False, **environment)
        heard = await manager.hears("STATUS=waiting: ")
        assert "READY=1" in heard
        assert (await shop.get(worker, "/livez")).status_code == 200
        waiting = await shop.get(worker, "/readyz")
        assert waiting.status_code == 503
        assert f"STATUS=waiting: {waiting.json()['reasons'][0]}" in heard
        assert (await shop.get(worker, "/metrics")).status_code == 200
        await way.open()
        await worker.said("working")
        await manager.hears("STATUS=idle")
        await worker.terminate()
