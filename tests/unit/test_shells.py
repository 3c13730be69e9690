"""Completion as a person has it: installed in a home of its own, and a key pressed in a new shell."""

import contextlib
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import ROOT

SECONDS = 60.0
PROMPT = "next> "
HANDLERS = """
from sqlalchemy.ext.asyncio import AsyncSession
from worker import Handlers

on = Handlers()

@on.derive("shop.bills", by="customer_id")
async def totals(customer_ids: list[int], session: AsyncSession) -> None: ...
"""
# What is typed, and what the line is after a tab. Each starts a process.
LINES = [
    ("tailrace dead-letters re", "tailrace dead-letters redrive"),
    ("tailrace lanes pause tills:to", "tailrace lanes pause tills:totals"),
]


class Home:
    """Somebody's home, with a module of handlers in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tills.py").write_text(HANDLERS)
        self.environment = {
            "HOME": str(folder),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HANDLERS": "tills",
            "TERM": "dumb",
            "LANG": "C.UTF-8",
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextlib.contextmanager
    def terminal(self, *command: str) -> Iterator["Terminal"]:
        pid, descriptor = pty.fork()
        if pid == 0:
            try:
                os.chdir(self.folder)
                os.execvpe(command[0], command, self.environment)  # noqa: S606 - a shell without a shell
            finally:
                os._exit(127)
        try:
            yield Terminal(descriptor)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(descriptor)


class Terminal:
    """Where somebody types."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def shows(self, text: str) -> None:
        """Read on until this text is there."""
        shown, deadline = "", time.monotonic() + SECONDS
        while text not in shown:
            assert time.monotonic() < deadline, repr(shown)
            if select.select([self._descriptor], [], [], 0.5)[0]:
                shown += os.read(self._descriptor, 4096).decode(errors="replace")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_what_is_typed_is_completed(home: Home, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    # The shell that installs it stays the parent of the command, by whose parent it is known.
    home.run(shell, "-c", "tailrace --install-completion && true")
    settings = home.folder / f".{shell}rc"
    settings.write_text(f"{settings.read_text()}\nPS1='{PROMPT}'\n")
    with home.terminal(shell, "-i") as terminal:
        terminal.shows(PROMPT)
        for typed, completed in LINES:
            terminal.type(f"{typed}\t")
            terminal.shows(completed)
            terminal.type("\x15")  # the line is thrown away


def test_what_is_typed_is_completed_by_fish(home: Home) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    home.run("fish", "-c", "tailrace --install-completion; and true")
    asked = "; ".join(f"complete --do-complete '{typed}'" for typed, _ in LINES)
    offered = [line.split("\t")[0] for line in home.run("fish", "-c", asked).splitlines()]
    assert offered == [completed.split()[-1] for _, completed in LINES]
