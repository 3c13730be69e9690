"""Processes that tests fork: what is ordered is what runs, and its end is told as it was."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests import forkserver
from tests.forkserver import ROOT, forks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="is forked on Linux alone")
WORKER = (sys.executable, "-m", "worker")
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
HANDLERS = """
import os, sys
from worker import Handlers

on = Handlers()


@on.insert("public.orders", name="_".join(sorted(os.environ)))
async def taken(change, session): ...


print(sys.path[0], os.getcwd(), len(sys.argv), file=sys.stderr)
if "HOLD" in os.environ:
    os.kill(os.getpid(), int(os.environ["HOLD"]))
"""


def test_it_has_its_own_arguments_environment_directory_and_streams(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANDLERS)
    given = ENVIRONMENT | {"HANDLERS": "mine"}
    assert forks(WORKER, given)
    done = forkserver.run([*WORKER, "handlers", "--json"], given, tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)[0]["name"] == "HANDLERS_PATH_PYTHONPATH"
    assert done.stderr == f"{tmp_path} {tmp_path} 3\n"


def test_it_finds_what_lies_on_the_path_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANDLERS)
    given = ENVIRONMENT | {"HANDLERS": "mine", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    assert forks(WORKER, given)
    assert forkserver.run([*WORKER, "handlers"], given, ROOT).returncode == 0


def test_exit_codes_are_those_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANDLERS)
    assert forkserver.run([*WORKER, "fly"], ENVIRONMENT, tmp_path).returncode == 2
    for number in (signal.SIGKILL, signal.SIGTERM):
        given = ENVIRONMENT | {"HANDLERS": "mine", "HOLD": str(int(number))}
        assert forkserver.run([*WORKER, "handlers"], given, tmp_path).returncode == -number


async def test_it_is_stopped_and_killed_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HANDLERS)
    given = ENVIRONMENT | {"HANDLERS": "mine", "HOLD": str(int(signal.SIGSTOP))}
    child = await forkserver.start([*WORKER, "handlers"], given, tmp_path)
    assert child.stderr is not None
    await child.stderr.readline()
    assert child.returncode is None
    child.kill()
    async with asyncio.timeout(30):
        assert await child.wait() == -signal.SIGKILL
        assert await child.stderr.read() == b""


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        ((sys.executable, "-c", "pass"), {}),
        ((sys.executable, "-m", "honcho"), {}),
        (("python3", "-m", "worker"), {}),
        (WORKER, {"PYTHONHASHSEED": "1"}),
        (WORKER, {"PYTHONPATH": "/elsewhere"}),
        (WORKER, {"TZ": "Asia/Tokyo"}),
        (WORKER, {"LC_ALL": "C"}),
    ],
)
def test_what_a_fork_would_not_show_is_started_anew(
    command: tuple[str, ...], environment: dict[str, str]
) -> None:
    assert not forks(command, ENVIRONMENT | environment)
