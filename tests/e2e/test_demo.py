"""The demo and `make run` as a newcomer meets them: started as processes, judged by output and exit code."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from examples.main import configured
from tests.leaks import written

ROOT = Path(__file__).parents[2]
SECONDS = 90
needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")

# What a stranger's shell may have set: none of it concerns the demo.
STRANGER = {
    "PATH": os.environ["PATH"],
    "HOME": "",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "DATABASE_URL": "postgresql://somebody@127.0.0.1:1/else",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "PORT": "1",
    "HANDLERS": "somebody.elses",
    "WORKER_LANES": "many",
    "WORKER_LOG_LEVEL": "error",
    "PGHOST": "somewhere.invalid",
    "PGSSLMODE": "verify-full",
    "HTTP_PROXY": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
}


class Running:
    """A demo, its output so far, and its folder."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.lines: list[str] = []

    async def line(self, text: str) -> str:
        """Read on until a line has this text."""
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            async for raw in self.process.stdout:
                self.lines.append(raw.decode().rstrip())
                if text in self.lines[-1]:
                    return self.lines[-1]
        raise AssertionError(f"the demo never said {text!r}: {self.lines}")

    async def ended(self) -> int:
        """Read on to the end; the exit code."""
        assert self.process.stdout is not None
        async with asyncio.timeout(SECONDS):
            rest = await self.process.stdout.read()
            self.lines += rest.decode().splitlines()
            return await self.process.wait()

    async def alone(self) -> list[str]:
        """Wait until no process is left in the demo's folder; those that are, if they do not end."""
        deadline = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline:
            # Processes that are not our children send us no signal.
            await asyncio.sleep(0.1)
        return left

    def processes(self, wanted: Callable[[str], bool] = lambda _command: True) -> list[str]:
        """List the processes that work in the demo's folder, as `PID COMMAND`."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                here = (process / "cwd").readlink().is_relative_to(self.folder)
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            # One that has ended, but has not been waited for, has no command line any more.
            if here and command and wanted(command):
                found.append(f"{process.name} {command}")
        return found

    def logs(self) -> set[str]:
        """Name the log files in the demo's folder."""
        return {path.name for path in self.folder.glob("*.log")}

    def hear(self) -> None:
        """Have the logs of its processes searched for secrets.

        The stand-in's tells the local keys on purpose, and the demo itself the address of its database.
        """
        for log in self.folder.glob("*.log"):
            if log.name != "stand-in.log":
                written.heard(log.name, log.read_text(errors="replace"))

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "a folder" / "demo"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def demo(folder: Path, *options: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "examples.demo", "--keep-data", str(folder), *options),
        cwd=ROOT,
        env=STRANGER,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    running = Running(process, folder)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await running.ended()
        running.hear()


@pytest.mark.slow
async def test_the_demo_ends_by_itself_and_everything_is_derived(folder: Path) -> None:
    async with demo(folder, "--for", "5", "--workers", "2") as running:
        assert await running.ended() == 0, running.text
        assert "customer_totals: " in running.text
        assert running.text.count("all equal") == 2
        assert "gaps: none" in running.text
        assert running.processes() == []
        assert {"listener.log", "worker-1.log", "worker-2.log"} <= running.logs()


@pytest.mark.slow
async def test_a_derived_row_that_is_wrong_is_found_out(folder: Path) -> None:
    async with demo(folder, "--for", "5") as running:
        url = (await running.line("database: ")).removeprefix("database: ")
        await running.line("applied: customer_totals")
        db = await asyncpg.connect(url)
        async with asyncio.timeout(SECONDS):
            # A commit of another process sends no signal.
            while await db.fetchval("select count(*) from order_status_log") == 0:
                await asyncio.sleep(0.1)
        # Nobody orders under these numbers: no later change mends what is wrong here.
        await db.execute("insert into customer_totals values (-1, 1, 1)")
        await db.execute("delete from order_status_log where id = (select min(id) from order_status_log)")
        await db.execute("insert into order_status_log (order_id, new_status) values (-2, 'new')")
        await db.close()
        assert await running.ended() == 1
        assert "customers DIFFER: -1" in running.text
        assert "customer_totals: 1 of " in running.text
        assert "order_status_log: 2 of " in running.text
        assert running.processes() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it_cleanly(folder: Path, number: signal.Signals) -> None:
    async with demo(folder) as running:
        await running.line("changes committed")
        running.process.send_signal(number)
        assert await running.ended() == 0, running.text
        assert "stopped; the shop had written" in running.text
        assert running.processes() == []


async def test_a_signal_while_it_starts_ends_it_too(folder: Path) -> None:
    async with demo(folder) as running:
        await running.line("starting PostgreSQL")
        running.process.send_signal(signal.SIGINT)
        assert await running.ended() == 0, running.text
        assert running.processes() == []


@needs_proc
async def test_when_it_is_killed_nothing_stays_behind(folder: Path) -> None:
    async with demo(folder) as running:
        await running.line("changes committed")
        assert running.processes()
        running.process.kill()
        await running.ended()
        assert await running.alone() == []


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("worker.jobs", "the worker was ended by SIGKILL"),
        ("-m standin", "the stand-in was ended by SIGKILL"),
        ("redis-server", "Redis went away"),
    ],
)
async def test_a_part_that_dies_is_named(folder: Path, command: str, told: str) -> None:
    async with demo(folder) as running:
        await running.line("changes committed")
        (part,) = running.processes(lambda found: "keeper" not in found and command in found)
        os.kill(int(part.split()[0]), signal.SIGKILL)
        assert await running.ended() == 1
        assert told in running.text
        assert "Traceback" not in running.text
        assert running.processes() == []


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *command],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


def test_a_folder_with_something_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("mine")
    done = run("examples.demo", "--keep-data", str(tmp_path))
    assert done.returncode == 2
    assert "is not empty" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["letter"]


@pytest.mark.parametrize("option", ["--for=0", "--for=nan", "--rate=-1", "--workers=1.5", "--fro=3"])
def test_options_that_mean_nothing_are_refused(option: str) -> None:
    done = run("examples.demo", option)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


class TestMakeRun:
    """What `make run` chooses."""

    @pytest.fixture(autouse=True)
    def elsewhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.chdir(tmp_path)

    def test_with_nothing_configured_it_is_the_demo(self) -> None:
        done = run("examples.main", "--help", PORT="1", WORKER_LANES="3", SUPABASE_URL="")
        assert done.returncode == 0
        assert "--for SECONDS" in done.stdout

    @pytest.mark.parametrize("where", ["environment", "file"])
    def test_half_a_configuration_is_a_problem_and_not_the_demo(self, tmp_path: Path, where: str) -> None:
        environment = {"SUPABASE_URL": "http://127.0.0.1:1"} if where == "environment" else {}
        if where == "file":
            (tmp_path / ".env").write_text("SUPABASE_URL=http://127.0.0.1:1\n")
        done = run("examples.main", **environment)
        assert done.returncode == 2
        assert [line.split()[1] for line in done.stderr.splitlines()[:-1]] == [
            "SUPABASE_SERVICE_ROLE_KEY",
            "DATABASE_URL",
            "REDIS_URL",
        ]
        assert "set: SUPABASE_URL;" in done.stderr.splitlines()[-1]

    def test_a_project_takes_no_options_of_the_demo(self) -> None:
        done = run("examples.main", "--for", "5", DATABASE_URL="postgresql://postgres@127.0.0.1:1/postgres")
        assert done.returncode == 2
        assert "takes no arguments" in done.stderr

    def test_a_whole_configuration_starts_the_main_job(self) -> None:
        done = run(
            "examples.main",
            SUPABASE_URL="http://127.0.0.1:1",
            SUPABASE_KEY="sb_secret_of_nobody",
            DATABASE_URL="postgresql://postgres@127.0.0.1:1/postgres",
            REDIS_URL="redis://127.0.0.1:1",
        )
        # It begins with the migrations, and there is no database.
        assert done.returncode == 2
        assert "nothing was migrated" in done.stderr

    def test_what_tells_of_a_project(self) -> None:
        given = {"WORKER_LANES": "4", "PORT": "1", "HANDLERS": "shop", "PGHOST": "db", "SUPABASE_URL": ""}
        assert configured(given, {}) == []
        assert configured(
            given | {"redis_url": "redis://h"}, {"SUPABASE_KEY": "k", "DATABASE_URL": None}
        ) == [
            "REDIS_URL",
            "SUPABASE_KEY",
        ]
