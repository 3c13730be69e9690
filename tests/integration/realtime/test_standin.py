"""The source against the stand-in on a real Postgres: committed rows, and each of its faults."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Protocol

import asyncpg
import pytest

from standin import Standin
from standin.embedded import EmbeddedPostgres, bootstrap_supabase
from tests.integration.realtime.phoenix import SHORT, Reading
from worker.change import RawChange
from worker.realtime import RealtimeSource

NOTES, LOGS = ("public", "notes"), ("public", "logs")


@dataclass
class Project:
    """A running stand-in, a session on its database, and what reads from it."""

    standin: Standin
    database: asyncpg.Connection
    reading: Reading

    async def insert(self, number: int, table: str = "notes") -> None:
        await self.database.execute(f"insert into public.{table} (id, price) values ($1, 12.50)", number)

    async def arrived(self, *numbers: int) -> None:
        await self.reading.until(lambda: set(numbers) <= set(self.reading.numbers))

    async def gap(self, cause: str) -> None:
        def lost() -> set[tuple[str, str]]:
            return {table for gap in self.reading.gaps if cause in gap.cause for table in gap.tables}

        await self.reading.until(lambda: lost() == {NOTES, LOGS})


class Start(Protocol):
    def __call__(self, canary: float = 5.0, **waits: float) -> AbstractAsyncContextManager[Project]: ...


@pytest.fixture(scope="module")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    settings = {"synchronous_commit": "on"}
    async with EmbeddedPostgres(tmp_path_factory.mktemp("realtime"), settings=settings) as server:
        await bootstrap_supabase(server.dsn())
        session = await asyncpg.connect(server.dsn())
        await session.execute(
            "create schema tailrace; grant usage on schema tailrace to service_role;"
            "create table tailrace.canary (id int primary key, token text);"
            "insert into tailrace.canary values (1, '');"
            "grant select on tailrace.canary to service_role;"
            "create table public.notes (id bigint primary key, price numeric, body text);"
            "create table public.logs (id bigint primary key, price numeric, body text);"
            "grant select on public.notes, public.logs to service_role;"
            "alter publication supabase_realtime add table tailrace.canary, public.notes, public.logs"
        )
        await session.close()
        yield server


@pytest.fixture
def project(postgres: EmbeddedPostgres) -> Start:
    @asynccontextmanager
    async def project(canary: float = 5.0, **waits: float) -> AsyncIterator[Project]:
        database = await asyncpg.connect(postgres.dsn())
        tokens = count()

        async def write_canary() -> str:
            token = f"{id(tokens)}-{next(tokens)}"
            session = await asyncpg.connect(postgres.dsn())
            try:
                await session.execute("update tailrace.canary set token = $1", token)
            finally:
                session.terminate()
            return token

        await database.execute("truncate public.notes, public.logs")
        try:
            async with Standin(postgres.dsn(), seed=1) as standin:
                source = RealtimeSource(
                    standin.realtime_url,
                    standin.service_role_key,
                    [NOTES, LOGS],
                    write_canary,
                    canary_seconds=0.2,
                    timing=replace(SHORT, canary=canary, acknowledge=3.0, join=3.0, **waits),
                )
                reading = Reading(source)
                task = asyncio.create_task(reading.run(), name="test: read")
                try:
                    await reading.ready()
                    yield Project(standin, database, reading)
                finally:
                    task.cancel()
                    await asyncio.wait({task})
        finally:
            await database.close()

    return project


async def test_committed_rows_arrive_in_order_and_exact(project: Start) -> None:
    async with project() as p:
        await p.database.execute(
            "insert into public.notes select n, 12345678901234567890.12345678901234567890 + n"
            " from generate_series(1, 500) n; update public.notes set body = 'é' where id = 1;"
            " delete from public.notes where id = 2"
        )
        await p.reading.until(lambda: len(p.reading.items) == 502)
    changes = [item for item in p.reading.items if isinstance(item, RawChange)]
    assert [change.type for change in changes] == ["INSERT"] * 500 + ["UPDATE", "DELETE"]
    first = changes[0]
    assert first.record is not None
    assert bytes(first.record["price"]) == b"12345678901234567891.12345678901234567890"
    assert [column.type for column in first.columns] == ["int8", "numeric", "text"]
    assert p.reading.gaps == []


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1012])
async def test_closed_connections(project: Start, code: int) -> None:
    async with project() as p:
        await p.insert(1)
        await p.arrived(1)
        await p.standin.drop_connections(code)
        await p.gap(str(code))
        await p.insert(2)
        await p.arrived(2)


async def test_a_silent_server(project: Start) -> None:
    async with project(canary=0.6) as p:
        p.standin.faults.silent = "current"
        await p.gap("silent")
        await p.insert(1)
        await p.arrived(1)


async def test_a_half_open_connection(project: Start) -> None:
    async with project(heartbeat_reply=0.4) as p:
        p.standin.faults.half_open = "current"
        await p.gap("heartbeat was not answered")
        await p.insert(1)
        await p.arrived(1)


async def test_refused_connections(project: Start) -> None:
    async with project() as p:
        p.standin.faults.refuse_connections = 401
        await p.standin.drop_connections(1012)
        health = await p.reading.healthy(lambda health: "401" in health.reasons[0])
        assert "SUPABASE_SERVICE_ROLE_KEY" in health.reasons[0]
        p.standin.faults.clear()
        await p.reading.ready()
        await p.insert(1)
        await p.arrived(1)


async def test_refused_joins(project: Start) -> None:
    async with project() as p:
        p.standin.faults.refuse_joins = "ChannelRateLimitReached: Too many channels"
        await p.standin.drop_connections(1012)
        await p.reading.healthy(lambda h: any("ChannelRateLimitReached" in reason for reason in h.reasons))
        p.standin.faults.clear()
        await p.reading.ready()


async def test_subscriptions_that_are_never_made(project: Start) -> None:
    async with project() as p:
        p.standin.faults.withhold_subscribed = True
        await p.standin.drop_connections(1012)
        await p.reading.healthy(lambda health: health.connected and not health.subscribed)
        p.standin.faults.clear()
        await p.reading.ready()
        await p.insert(1)
        await p.arrived(1)


async def test_expired_tokens(project: Start) -> None:
    async with project() as p:
        p.standin.expire_tokens()
        await p.gap("Token has expired")
        await p.insert(1)
        await p.arrived(1)


async def test_system_errors(project: Start) -> None:
    async with project() as p:
        p.standin.system_error("something is amiss")
        await p.gap("something is amiss")
        await p.reading.ready()
        await p.insert(1)
        await p.arrived(1)


async def test_the_late_close_of_another_join(project: Start) -> None:
    async with project() as p:
        p.standin.late_close()
        await p.insert(1)
        await p.insert(2, "logs")
        await p.arrived(1, 2)
        assert p.reading.source.counts.connections == 1
    assert p.reading.gaps == []


async def test_subscriptions_made_anew(project: Start) -> None:
    async with project() as p:
        p.standin.repeat_subscribed()
        await p.gap("made the subscription anew")
        assert p.reading.source.counts.connections == 1


async def test_dropped_changes_are_noticed_by_the_canary(project: Start) -> None:
    async with project() as p:
        p.standin.faults.drop_next = 1
        await p.gap("dropped changes")
        assert p.reading.source.counts.connections == 1


async def test_truncated_changes_pass(project: Start) -> None:
    async with project() as p:
        p.standin.faults.truncate = True
        await p.insert(1)
        await p.reading.until(lambda: any(isinstance(item, RawChange) for item in p.reading.items))
        changes = [item for item in p.reading.items if isinstance(item, RawChange)]
        assert changes[0].errors == ("Error 413: Payload Too Large",)


async def test_withheld_changes(project: Start) -> None:
    async with project() as p:
        p.standin.faults.error_events = 401
        await p.insert(1)
        await p.reading.until(lambda: p.reading.gaps)
        p.standin.faults.clear()
        await p.insert(2)
        await p.arrived(2)
    assert p.reading.gaps[-1].tables == (NOTES,)
    assert 1 not in p.reading.numbers


async def test_a_large_row(project: Start) -> None:
    async with project() as p:
        p.standin.faults.oversize = True
        await p.insert(1)
        await p.arrived(1)
        assert p.reading.source.counts.connections == 1


async def test_a_database_that_crashes_and_recovers(project: Start, postgres: EmbeddedPostgres) -> None:
    async with project() as p:
        await p.insert(1)
        await p.arrived(1)
        await postgres.kill()
        await p.reading.healthy(lambda h: any("canary row cannot be written" in r for r in h.reasons))
        await postgres.start()
        # Realtime says nothing of it: its temporary slot was lost, and what was committed meanwhile with it.
        await p.gap("the database was away")
        await p.reading.ready()


async def test_a_key_that_was_never_good(postgres: EmbeddedPostgres) -> None:
    async def write_canary() -> str:
        return "never"

    async with Standin(postgres.dsn(), seed=1) as standin:
        reading = Reading(
            RealtimeSource(standin.realtime_url, "not-a-key", [NOTES], write_canary, timing=SHORT)
        )
        task = asyncio.create_task(reading.run(), name="test: read")
        health = await reading.healthy(lambda health: "401" in health.reasons[0])
        task.cancel()
        await asyncio.wait({task})
    assert "check SUPABASE_SERVICE_ROLE_KEY" in health.reasons[0]
