"""docs/project.md, block by block, in an empty directory, with Tailrace installed as the page says."""

import asyncio
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from standin import Standin
from standin.embedded import bootstrap_supabase
from tests.leaks import written
from tests.stack import ROOT, SECRET, Process, Servers, execute

PAGE = (ROOT / "docs/project.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TREE = ("config", "worker", "handlers", "migrations", "standin")
BIN = Path(sys.executable).parent
PASSWORD = "7c1e4a52d09b"


def blocks(heading: str) -> list[tuple[str, str]]:
    """Language and text of a section's blocks, in their order."""
    return FENCE.findall(PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0])


class Newcomer:
    """Somebody with a Supabase project, a Redis, a checkout of Tailrace and an empty directory beside it."""

    def __init__(self, home: Path, db: asyncpg.Connection, settings: dict[str, str]) -> None:
        self.folder = home / "shop"
        self.folder.mkdir()
        self.db = db
        self._settings = settings
        written.given(settings)
        self.database_url = settings["DATABASE_URL"]
        self._processes: list[Process] = []
        self.environment = {
            "HOME": str(home),
            # As python3 where the new environment is made; afterwards its own comes first.
            "PATH": f"{home / 'bin'}:{os.environ['PATH']}",
            # No index is asked: what Tailrace needs is taken from where these tests have it.
            "PYTHONPATH": sysconfig.get_path("purelib"),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # so pip reads it: false is the value that switches isolation off
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_COMPILE": "1",  # what is used is compiled when it is used
            "PORT": "0",
        }
        checkout = home / "tailrace"
        for name in TREE:
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "pytest_tailrace.py"):
            shutil.copy(ROOT / name, checkout)
        (home / "bin").mkdir()
        (home / "bin/python3").symlink_to(Path(sys.base_prefix) / "bin" / "python3")

    async def follow(self, heading: str) -> None:
        """Do what a section says."""
        for language, text in blocks(heading):
            await self.do(language, text)

    async def do(self, language: str, text: str) -> None:
        """Write a file, or run a block."""
        named = re.match(r"# (\S+)\n", text)
        if named:
            path = self.folder / named[1]
            assert path.parent.is_dir(), f"{named[1]}: the page makes no such folder"
            path.write_text(self._filled(text) if named[1] == ".env" else text)
        elif language == "sql":
            await self.db.execute(text)
        else:
            assert language == "sh", text
            process = await self.start(text, output=True)
            output, _ = await asyncio.wait_for(process.communicate(), 120)
            written.heard(text.strip(), output.decode())
            assert process.returncode == 0, output.decode()
            if "venv" in text:  # what pip would have put there, had it installed arq and alembic, too
                for name in ("arq", "alembic"):
                    script = (BIN / name).read_text().splitlines()
                    script[0] = f"#!{self.folder}/.venv/bin/python"
                    (self.folder / ".venv/bin" / name).write_text("\n".join(script))
                    (self.folder / ".venv/bin" / name).chmod(0o755)

    def _filled(self, text: str) -> str:
        """The page's settings with this project's values: no other setting is given to anything."""
        names = re.findall(r"^(\w+)=", text, re.MULTILINE)
        assert set(names) == set(self._settings)
        return "".join(f"{name}={self._settings[name]}\n" for name in names)

    async def start(self, script: str, *, output: bool = False) -> asyncio.subprocess.Process:
        activated = ". .venv/bin/activate\n" if (self.folder / ".venv").exists() else ""
        return await asyncio.create_subprocess_exec(
            *("sh", "-ec", activated + script),
            cwd=self.folder,
            env=self.environment,
            stdout=asyncio.subprocess.PIPE if output else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.STDOUT if output else asyncio.subprocess.PIPE,
            limit=2**20,
        )

    async def run(self, command: str) -> Process:
        """Start what does not end by itself."""
        process = Process(await self.start(f"exec {command}"), command)
        self._processes.append(process)
        return process

    async def total(self, amount: str) -> None:
        """Wait until customer 7 has this total: commits of others send no signal."""
        async with asyncio.timeout(30):
            while str(await self.db.fetchval("select amount from totals where customer_id = 7")) != amount:
                await asyncio.sleep(0.02)

    async def tables(self) -> set[str]:
        rows = await self.db.fetch(
            "select schemaname || '.' || tablename from pg_tables"
            " where schemaname = 'public' or tablename = 'migration'"
        )
        return {row[0] for row in rows}

    async def leave(self) -> None:
        for process in self._processes:
            await process.kill()


@pytest.fixture
async def newcomer(shared: Servers, tmp_path: Path) -> AsyncIterator[Newcomer]:
    await execute(shared.postgres.dsn(), "create database newcomer")
    await bootstrap_supabase(shared.postgres.dsn("newcomer"))
    # A password that no log has another reason to contain.
    await execute(shared.postgres.dsn(), f"create role newcomer superuser login password '{PASSWORD}'")
    url = shared.postgres.dsn("newcomer", user="newcomer", password=PASSWORD)
    db = await asyncpg.connect(url)
    async with Standin(url, jwt_secret=SECRET, poll_interval=0.005) as standin:
        settings = {
            "SUPABASE_URL": standin.supabase_url,
            "SUPABASE_SERVICE_ROLE_KEY": standin.service_role_key,
            "DATABASE_URL": url,
            "REDIS_URL": shared.redis.url,
        }
        one = Newcomer(tmp_path, db, settings)
        yield one
        await one.leave()
        await db.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
            " where database = current_database() and not temporary"
        )
        await db.close()
    for statement in ("drop database newcomer with (force)", "drop role newcomer"):
        await execute(shared.postgres.dsn(), statement)


DB_ENV = """
import asyncio
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine

def run(connection):
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()

async def main():
    engine = create_async_engine(context.config.get_main_option("sqlalchemy.url"))
    async with engine.begin() as connection:
        await connection.run_sync(run)
    await engine.dispose()

asyncio.run(main())
"""
DB_REVISION = """
from alembic import op

revision = "shop_0001"
down_revision = None

def upgrade():
    op.execute("create table public.goods (id bigint primary key)")

def downgrade():
    op.execute("drop table public.goods")
"""


@pytest.mark.slow
@pytest.mark.timeout(400)  # a dozen processes, one after the other, and pip: half a minute on two cores
async def test_from_an_empty_directory_to_a_derived_row(newcomer: Newcomer) -> None:
    for heading in (
        "Install",
        "Settings",
        "The table that is followed",
        "A handler",
        "The table that is derived",
    ):
        await newcomer.follow(heading)
    assert await newcomer.tables() == {
        "public.orders",
        "public.totals",
        "public.handlers_version",
        "tailrace.migration",
    }
    installed = {path.name for path in newcomer.folder.glob(".venv/lib/*/site-packages/*")}
    assert "worker" in installed
    assert "handlers" not in installed  # the example's would hide theirs from arq
    (_, start), (_, insert), (language, procfile) = blocks("Run")
    both = await newcomer.run(start)
    await asyncio.gather(both.said("subscribed"), both.said("working"))
    await newcomer.do("sql", insert)
    await newcomer.total("42.50")
    assert await both.terminate() == 0

    await newcomer.do(language, procfile)
    commands = dict(line.split(": ", 1) for line in procfile.splitlines()[1:])
    assert commands["release"] == "python -m worker migrate"  # as was done before
    listener, worker = await newcomer.run(commands["listener"]), await newcomer.run(commands["worker"])
    await asyncio.gather(listener.said("subscribed"), worker.said("working"))
    await newcomer.do("sql", insert)
    await newcomer.total("85.00")
    assert [await listener.terminate(), await worker.terminate()] == [0, 0]

    # The application's own Alembic: with the page's filter it would leave all of this alone, ...
    scope: dict[str, object] = {}
    (_, include_name), (_, remove), (_, ini), (_, commands_of_both) = blocks("Beside your own Alembic")
    exec(include_name, scope)  # noqa: S102 - what the page shows
    leaves = scope["include_name"]
    assert callable(leaves)
    mine = {name for name in await newcomer.tables() if leaves(name.split(".")[1], "table", {})}
    assert mine == {"public.orders", "tailrace.migration"}
    assert not leaves("tailrace", "schema", {})

    # ... or it takes the handlers' revisions in, as a branch of its own.
    await newcomer.db.execute("drop table totals, handlers_version")
    (newcomer.folder / "db/versions").mkdir(parents=True)
    (newcomer.folder / "db/env.py").write_text(DB_ENV)
    (newcomer.folder / "db/versions/0001_goods.py").write_text(DB_REVISION)
    url = newcomer.database_url.replace("postgresql:", "postgresql+asyncpg:")
    await newcomer.do("sh", remove)
    await newcomer.do("ini", f"{ini}sqlalchemy.url = {url}\n")
    upgrade, downgrade = commands_of_both.splitlines()
    await newcomer.do("sh", upgrade)
    versions = await newcomer.db.fetch("select version_num from alembic_version")
    assert {row[0] for row in versions} == {"shop_0001", "handlers_0001"}
    await newcomer.do("sh", "python -m worker migrate")  # leaves them to the application
    both_kinds = {"public.orders", "public.goods", "public.alembic_version", "tailrace.migration"}
    assert await newcomer.tables() == both_kinds | {"public.totals"}
    await newcomer.do("sh", downgrade)
    assert await newcomer.tables() == both_kinds


@pytest.mark.parametrize(
    "start", ["python -m worker handlers", "tailrace handlers", "arq worker.jobs.WorkerSettings"]
)
async def test_a_name_that_is_taken_is_told(start: str, tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("DEBUG = True\n")
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_shell(
        f"exec {start}", cwd=tmp_path, env=environment, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, said = await process.communicate()
    assert process.returncode == 2
    assert said.decode().splitlines() == [
        "tailrace: config.py has the name of a package of Tailrace: rename it, or start in another directory"
    ]
