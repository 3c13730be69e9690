"""The doctor's patients: embedded Postgres and Redis and the stand-in Realtime, made ill in turn."""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings, load_settings
from standin.embedded import EmbeddedPostgres, EmbeddedRedis
from standin.server import Standin
from tests import forkserver
from tests.leaks import written
from tests.stack import only_environment
from worker.check.findings import Finding, Fix
from worker.check.fixing import Done, fix, fixes_of
from worker.check.rounds import run_checks
from worker.runtime import upgrade

HANDLERS = """
from worker import Handlers

on = Handlers()


@on.derive("public.orders", by="customer_id", name="totals")
async def totals(customers, session): ...


@on.insert("public.orders", name="orders")
async def orders(change, session): ...
"""
MIGRATE = Finding("migrations", "problem", "", "", (Fix("migrate", "python -m worker migrate"),))
# Row-level security leaves of DELETE the key alone: what computes by another column wants proven delivery.
INSERTS = """
from worker import Handlers

on = Handlers()


@on.insert("public.orders", name="orders")
async def orders(change, session): ...
"""
ROOT = Path(__file__).parents[3]


class Patients(NamedTuple):
    postgres: EmbeddedPostgres
    redis: EmbeddedRedis
    realtime: Standin
    directory: Path

    def environment(self, **settings: str) -> dict[str, str]:
        return {
            "SUPABASE_URL": self.realtime.supabase_url,
            "REALTIME_URL": self.realtime.realtime_url,
            "SUPABASE_SERVICE_ROLE_KEY": self.realtime.service_role_key,
            "DATABASE_URL": self.postgres.dsn(),
            "REDIS_URL": self.redis.url,
            "HANDLERS": "patients_shop",
            **settings,
        }

    def settings(self, **settings: str) -> Settings:
        with only_environment(self.environment(**settings)):
            return load_settings(None)

    async def connect(self) -> asyncpg.Connection:
        return await asyncpg.connect(self.postgres.dsn())

    async def sql(self, *statements: str) -> None:
        connection = await self.connect()
        try:
            for statement in statements:
                await connection.execute(statement)
        finally:
            await connection.close()

    async def value(self, query: str) -> Any:
        connection = await self.connect()
        try:
            return await connection.fetchval(query)
        finally:
            await connection.close()

    async def tailrace(
        self, *arguments: str, shifted: float = 0.0, answer: str = "", **settings: str
    ) -> tuple[int, str, str]:
        """Run a command to its end: its exit code, what it printed, its errors.

        Args:
            arguments: of `python -m worker`.
            shifted: seconds by which its clock is ahead.
            answer: what a person types at a terminal; where nothing, there is no terminal.
            settings: as in its environment.
        """
        person, its = os.openpty() if answer else (-1, asyncio.subprocess.DEVNULL)
        clock = f"import time; true = time.time; time.time = lambda: true() + {shifted}"
        entry = ["-c", f"{clock}; from worker.__main__ import main; main()"] if shifted else ["-m", "worker"]
        own = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment = own | {"PYTHONPATH": str(ROOT)} | self.environment(**settings)
        command = [sys.executable, *entry, *arguments]
        if not answer and forkserver.forks(command, environment):
            done = await asyncio.to_thread(forkserver.run, command, environment, self.directory)
            code, said = done.returncode, (done.stdout, done.stderr)
        else:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.directory,
                env=environment,
                stdin=its,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            if answer:
                os.close(its)
                os.write(person, f"{answer}\n".encode())
            output, errors = await asyncio.wait_for(process.communicate(), 120)
            if answer:
                os.close(person)
            assert process.returncode is not None
            code, said = process.returncode, (output.decode(), errors.decode())
        written.given(self.environment(**settings))
        written.heard(f"python -m worker {' '.join(arguments)}", "".join(said))
        return code, *said

    @asynccontextmanager
    async def server(self, **settings: object) -> AsyncIterator[None]:
        """Run the same cluster with other settings for a while."""
        await self.postgres.stop()
        ours = {"max_slot_wal_keep_size": "2GB"} | settings
        try:
            async with EmbeddedPostgres(self.postgres.data_dir, port=self.postgres.port, settings=ours):
                yield
        finally:
            await self.postgres.start()

    async def findings(self, **settings: str) -> list[Finding]:
        """Examine here: a process for each would take most of the time."""
        found = await run_checks(self.settings(**settings))
        text = json.dumps([one.told() for one in found])
        assert "hunter2" not in text
        assert self.environment(**settings)["SUPABASE_SERVICE_ROLE_KEY"] not in text
        return found

    async def wrong(self, **settings: str) -> list[Finding]:
        """What ails them."""
        return [one for one in await self.findings(**settings) if one.is_wrong]

    async def problems(self, **settings: str) -> list[Finding]:
        """What is a problem, which must be something."""
        found = [one for one in await self.findings(**settings) if one.state == "problem"]
        assert found
        return found

    async def mended(
        self, findings: Sequence[Finding], slots: Sequence[str] = (), **settings: str
    ) -> list[Done]:
        """Have done what is safe."""
        given = self.settings(**settings)

        async def migrate(engine: AsyncEngine) -> None:
            await upgrade(engine, given)

        return await fix(given, fixes_of(findings, slots), migrate)
