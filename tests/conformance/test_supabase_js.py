"""`@supabase/supabase-js` against the stand-in, driven through `supabase_js/drive.mjs`.

It runs where node and the package are at hand: in `supabase_js/node_modules`, or in the directory that
`TAILRACE_SUPABASE_JS` names (a folder with a `node_modules`). Nothing is installed by a test.
"""

import asyncio
import json
import os
import shutil
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from standin import Standin

FOLDER = Path(__file__).parent / "supabase_js"
PATIENCE = 20.0


def installed() -> Path | None:
    for folder in (Path(os.environ.get("TAILRACE_SUPABASE_JS", FOLDER)), FOLDER):
        if (folder / "node_modules" / "@supabase" / "supabase-js").is_dir():
            return folder
    return None


pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not on this machine"),
    pytest.mark.skipif(
        installed() is None,
        reason="supabase-js is not installed: npm install --prefix tests/conformance/supabase_js",
    ),
]


class Driven:
    """The script and the events it has told."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin, self.stdout = process.stdin, process.stdout
        self.events: list[dict[str, Any]] = []

    def tell(self, **command: Any) -> None:
        self.stdin.write(json.dumps(command).encode() + b"\n")

    async def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read events until one is wanted."""
        async with asyncio.timeout(PATIENCE):
            while line := await self.stdout.readline():
                self.events.append(json.loads(line))
                if wanted(self.events[-1]):
                    return self.events[-1]
        raise AssertionError(f"the script ended; it told {self.events}")

    async def changes(self, number: int) -> list[dict[str, Any]]:
        return [(await self.until(lambda event: "change" in event))["change"] for _ in range(number)]


@asynccontextmanager
async def driven(standin: Standin, key: str, work: Path) -> AsyncIterator[Driven]:
    folder = installed()
    assert folder is not None
    # Modules are looked for beside the script.
    (work / "node_modules").symlink_to(folder / "node_modules")
    script = shutil.copy(FOLDER / "drive.mjs", work)
    process = await asyncio.create_subprocess_exec(
        "node", str(script), standin.supabase_url, key, stdin=PIPE, stdout=PIPE, cwd=work
    )
    try:
        driving = Driven(process)
        await driving.until(lambda event: "ready" in event)
        yield driving
        driving.tell(end=True)
        assert await asyncio.wait_for(process.wait(), PATIENCE) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.fixture
async def writer(project: str) -> AsyncIterator[asyncpg.Connection]:
    session = await asyncpg.connect(project)
    await session.execute(
        "create table public.boats(id int primary key, name text, tonnage numeric);"
        "alter publication supabase_realtime add table boats"
    )
    yield session
    await session.close()


def acknowledged(event: dict[str, Any]) -> bool:
    return "system" in event and event["system"]["message"] == "Subscribed to PostgreSQL"


BOATS = {"event": "*", "schema": "public", "table": "boats"}


async def test_insert_update_and_delete_arrive(
    project: str, writer: asyncpg.Connection, tmp_path: Path
) -> None:
    async with Standin(project) as standin, driven(standin, standin.service_role_key, tmp_path) as script:
        script.tell(join="boats", binding=BOATS)
        await script.until(acknowledged)
        assert {"topic": "boats", "status": "SUBSCRIBED", "error": None} in script.events
        await writer.execute("insert into boats values(1, 'Ida', 12.50)")
        await writer.execute("update boats set name = 'Eva'")
        await writer.execute("delete from boats")
        inserted, updated, deleted = await script.changes(3)
        assert inserted["eventType"] == "INSERT"
        assert inserted["new"] == {"id": 1, "name": "Ida", "tonnage": 12.5}
        assert inserted["errors"] is None
        assert (updated["new"]["name"], updated["old"]) == ("Eva", {"id": 1})
        assert (deleted["eventType"], deleted["old"]) == ("DELETE", {"id": 1})
        script.tell(leave="boats")
        assert (await script.until(lambda event: "left" in event))["left"] == "ok"


async def test_a_filter_a_refusal_and_a_new_token(
    project: str, writer: asyncpg.Connection, tmp_path: Path
) -> None:
    async with Standin(project) as standin, driven(standin, standin.anon_key, tmp_path) as script:
        script.tell(join="heavy", binding={**BOATS, "event": "INSERT", "filter": "tonnage=gt.10"})
        await script.until(acknowledged)
        await writer.execute("insert into boats values(1, 'Ida', 2), (2, 'Eva', 20)")
        assert [change["new"]["id"] for change in await script.changes(1)] == [2]
        script.tell(auth=standin.sign({"role": "anon", "sub": "someone"}))
        await script.until(acknowledged)
        script.tell(join="unknown", binding={**BOATS, "table": "planes"})
        refused = await script.until(lambda event: event.get("system", {}).get("status") == "error")
        assert "table: planes" in refused["system"]["message"]
        await writer.execute("insert into boats values(3, 'Una', 30)")
        assert [change["new"]["id"] for change in await script.changes(1)] == [3]


async def test_the_client_comes_back_after_a_closed_connection(
    project: str, writer: asyncpg.Connection, tmp_path: Path
) -> None:
    async with Standin(project) as standin, driven(standin, standin.service_role_key, tmp_path) as script:
        script.tell(join="boats", binding=BOATS)
        await script.until(acknowledged)
        await standin.drop_connections(1012)
        await script.until(acknowledged)
        await writer.execute("insert into boats values(1, 'Ida', 1)")
        assert [change["new"]["id"] for change in await script.changes(1)] == [1]
