"""docs/tutorial.md, followed from top to bottom, in an empty directory and a project with nothing of ours."""

import asyncio
import os
import re
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.leaks import written
from tests.pages import Block, blocks
from tests.stack import DEADLINE_SECONDS, ROOT, Process, Project, Servers, project

PAGE = "docs/tutorial.md"
BEFORE_MIGRATIONS = "drop schema tailrace cascade"
PATIENCE = 2 * DEADLINE_SECONDS
"""For a command, which on a busy machine starts slowly; there are ten of them."""


class Reader:
    """Somebody who does what the page says."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project = project
        self.folder = folder
        self.environment = {
            # A checkout is installed by `pip install`, which another page's test tries.
            "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "WORKER_QUEUE": project.environment["WORKER_QUEUE"],
            "PORT": str(free_port()),
            "WORKER_LOG_FORMAT": "json",
        }
        self.running: Process | None = None
        self.query = ""
        self.shown = ""
        self.code: int | None = None

    async def follow(self, block: Block) -> None:
        match block.language:
            case "sql":
                await self.sql(block.text)
            case "ini":
                self.settings(block.text)
            case "python":
                assert block.file is not None
                (self.folder / block.file).write_text(block.text)
            case "sh":
                for line in block.text.splitlines():
                    await self.shell(line)
            case "text":
                await self.compare(block.text)

    async def sql(self, text: str) -> None:
        self.query = text if text.startswith("select c") else ""
        if not self.query:
            await self.project.db.execute(text)

    def settings(self, text: str) -> None:
        names = re.findall(r"^(\w+)=", text, re.MULTILINE)
        values = [f"{name}={self.project.environment[name]}" for name in names]
        (self.folder / ".env").write_text("\n".join(values))

    async def shell(self, line: str) -> None:
        words = shlex.split(line)
        if words[:3] != ["python", "-m", "worker"]:
            assert words[0] in {"mkdir", "cd", "python3", ".", "pip", "touch"}, line
            for name in words[1:] if words[0] == "touch" else ():
                (self.folder / name).parent.mkdir(exist_ok=True)
                (self.folder / name).touch()
            return
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *words[1:],
            cwd=self.folder,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        if words[3] == "run":
            self.running = Process(process, "run")
            for event in ("listening", "working"):
                await self.running.said(event, seconds=PATIENCE)
            return
        async with asyncio.timeout(PATIENCE):
            out, errors = await process.communicate()
        self.shown = (out + errors).decode()
        written.heard(line, self.shown)
        self.code = process.returncode

    async def compare(self, text: str) -> None:
        if not self.query:
            shown = self.shown.splitlines()
            assert [line for line in text.splitlines() if line not in shown] == [], self.shown
            return
        header, *rows = [line.split() for line in text.splitlines()]
        found: list[Any] = []
        for _ in range(int(DEADLINE_SECONDS / 0.05)):
            found = await self.project.db.fetch(self.query)
            if [[str(value) for value in row] for row in found] == rows:
                break
            await asyncio.sleep(0.05)
        assert [[str(value) for value in row] for row in found] == rows
        assert list(found[0].keys()) == header

    async def stop(self) -> None:
        if self.running is not None:
            assert await self.running.terminate() == 0
            self.running = None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
async def reader(shared: Servers, tmp_path: Path) -> AsyncIterator[Reader]:
    async with project(shared, BEFORE_MIGRATIONS, "handlers") as made:
        reading = Reader(made, tmp_path)
        try:
            yield reading
        finally:
            # Not by a kill: its listener and its worker would outlive it.
            await reading.stop()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_the_tutorial_does_what_it_says(reader: Reader) -> None:
    sections = [block.section for block in blocks(page=PAGE)]
    assert len(set(sections)) == 8
    codes = []
    for block in blocks(page=PAGE):
        # Where the prose says so: meanwhile, and before it is cleaned up.
        if block.language == "sql" and block.text.startswith(("update", "select pg_drop")):
            await reader.stop()
        await reader.follow(block)
        if block.text.startswith("python -m worker") and " run" not in block.text:
            codes.append((block.section[:1], reader.code))
    assert codes == [("4", 1), ("4", 0), ("6", 0), ("7", 0)]
    assert not await reader.project.db.fetchval(
        "select count(*) from pg_replication_slots where slot_name = 'tailrace'"
    )
