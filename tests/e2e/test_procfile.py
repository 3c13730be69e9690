"""The commands of the Procfile, as a platform runs them, and `python -m worker run`: all end with 0."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from tests.e2e import shop as handlers
from tests.stack import ROOT, Process, Project, Relay, Servers, project

BIN = Path(sys.executable).parent
STOP_SECONDS = 10.0
"""What the end of a process may take that has nothing to drain."""


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    """A shop whose processes find `python`, `arq` and `honcho` as in an activated environment."""
    async with project(shared, handlers.TABLES, "tests.e2e.shop") as made:
        made.environment["PATH"] = f"{BIN}:{made.environment['PATH']}"
        yield made


def children(process: Process) -> list[int]:
    """Process ids of all that descends from a process."""
    found, waiting = [], [process.process.pid]
    while waiting:
        with contextlib.suppress(FileNotFoundError):
            tasks = Path(f"/proc/{waiting.pop()}/task")
            for task in tasks.iterdir():
                born = [int(pid) for pid in (task / "children").read_text().split()]
                found += born
                waiting += born
    return found


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def living(pids: list[int]) -> list[int]:
    """Those that run; what is dead may wait for long until somebody asks for its exit code."""
    found = []
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] if state != "Z" else []
    return found


async def gone(pids: list[int]) -> None:
    """Wait until none of them runs: they are no children of ours, so nothing tells."""
    deadline = time.monotonic() + STOP_SECONDS
    while living(pids):
        assert time.monotonic() < deadline, living(pids)
        await asyncio.sleep(0.02)


async def works(shop: Project) -> None:
    before = await shop.db.fetchval("select count(*) from derived_log")
    await shop.db.execute("insert into orders (customer_id) values (1)")
    await shop.until("select count(*) from derived_log", before + 1)
    await shop.until(handlers.DIFFERENCES, 0)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
async def test_the_procfile_under_honcho(shop: Project) -> None:
    # What the processes log comes out of honcho's standard output.
    honcho = f"exec honcho --no-colour --no-prefix --procfile {ROOT / 'Procfile'} start"
    release = await shop.start("sh", "-c", f"{honcho} release 1>&2", name="release")
    assert await release.ended() == 0, release.text
    platform = await shop.start("sh", "-c", f"{honcho} listener worker 1>&2", name="honcho")
    await asyncio.gather(platform.said("subscribed"), platform.said("working"))
    await works(shop)
    pids = children(platform)
    assert len(pids) >= 2
    platform.process.send_signal(signal.SIGTERM)
    await platform.ended(STOP_SECONDS)
    # honcho's shells die of the signal, and honcho waits for no more than them: what shows a clean end is
    # what a process puts back.
    await gone(pids)
    assert await shop.db.fetchval("select lease_token is null from tailrace.source")
    async with Redis.from_url(shop.environment["REDIS_URL"]) as redis:
        assert await redis.keys(f"{shop.environment['WORKER_QUEUE']}:health-check:*") == []
    assert "Traceback" not in platform.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
async def test_run_is_both_and_ends_cleanly(shop: Project, number: signal.Signals) -> None:
    both = await shop.start(sys.executable, "-m", "worker", "run", name="run")
    await asyncio.gather(both.said("subscribed"), both.said("working"))
    await works(shop)
    pids = children(both)
    both.process.send_signal(number)
    assert await both.ended(STOP_SECONDS) == 0
    assert [line["message"] for line in both.lines].count("stopped") == 2
    assert "Traceback" not in both.text
    assert not living(pids)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("dies", ["worker listen", "arq worker.jobs"])
async def test_run_ends_when_one_of_both_ends(shop: Project, dies: str) -> None:
    both = await shop.start(sys.executable, "-m", "worker", "run", name="run")
    await asyncio.gather(both.said("subscribed"), both.said("working"))
    pids = children(both)
    (victim,) = [pid for pid in pids if dies in command(pid)]
    os.kill(victim, signal.SIGKILL)
    assert await both.ended(STOP_SECONDS) != 0
    assert not living(pids)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("start", ["exec python -m worker run", "exec make --silent run"])
async def test_both_end_in_good_order_when_what_started_them_is_killed(shop: Project, start: str) -> None:
    # make would set up an environment of its own: here it is to do nothing else but run.
    make = f" --file {ROOT / 'Makefile'} --old-file .venv/.installed BIN={BIN}" if "make" in start else ""
    both = await shop.start("sh", "-c", start + make, name="run")
    await asyncio.gather(both.said("subscribed"), both.said("working"))
    await works(shop)
    pids = children(both)
    both.process.kill()
    await gone(pids)
    await both.ended(STOP_SECONDS)  # the log, too: nobody is left who would write it
    assert [line["message"] for line in both.lines].count("stopped") == 2
    assert await shop.db.fetchval("select lease_token is null from tailrace.source")
    assert "Traceback" not in both.text


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
async def test_a_child_without_its_parent_from_the_beginning_does_not_stay(shop: Project) -> None:
    command = (sys.executable, "-m", "worker.parent", "20", "worker", "listen")
    listener = await shop.start("sh", "-c", 'true | exec "$@"', "sh", *command, name="listener")
    await listener.ended(STOP_SECONDS)
    assert listener.process.returncode in {0, 128 + signal.SIGTERM}
    # Nothing of it is in the way of the next one.
    await shop.listener()


@pytest.mark.parametrize("away", ["DATABASE_URL", "REDIS_URL"])
async def test_sigterm_while_waiting_at_the_start_ends_with_0(shop: Project, away: str) -> None:
    async with Relay(shop.environment[away]) as relay:
        nowhere = {away: relay.url}
        listener, worker = await asyncio.gather(
            shop.listener(wait=False, **nowhere), shop.worker(wait=False, **nowhere)
        )
        for process in (listener, worker):
            await process.said("waiting for")
        for process in (listener, worker):
            process.process.send_signal(signal.SIGTERM)
        assert (await listener.ended(STOP_SECONDS), await worker.ended(STOP_SECONDS)) == (0, 0)
        assert "Traceback" not in listener.text + worker.text
