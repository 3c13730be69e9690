"""What the listener writes itself is in the log it reads: it must be no reason to write more."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import event

from tests.e2e import shop
from tests.integration.wal.bench import Kind
from tests.stack import DEADLINE_SECONDS, Project, Servers, project
from worker import lease
from worker.database import make_engine
from worker.draining.workshop import load_handlers
from worker.lanes import Lane, Lanes
from worker.queue import connection_pool
from worker.reading import Ground, ProvenReading
from worker.wal import Transport

WRITES = re.compile(r"\s*(with .*)?(insert|update|delete)\b|.*pg_replication_slot_advance", re.DOTALL)
EVERYTHING = """
drop publication supabase_realtime;
create publication supabase_realtime for all tables;
create table elsewhere (id int);
"""


class Own:
    """A reading of a log in which everything is published, the listener's own tables too."""

    def __init__(self, project: Project, ground: Ground, token: str) -> None:
        self.project = project
        self.ground = ground
        self.token = token
        self.reading = ProvenReading(ground, token)

    async def confirmed(self) -> int:
        """Tell where the slot stands."""
        lsn: int = await self.project.db.fetchval(
            "select (confirmed_flush_lsn - '0/0')::bigint from pg_replication_slots where slot_name = $1",
            self.ground.settings.slot,
        )
        return lsn

    async def write(self) -> None:
        """Write what the listener writes without being asked: canary, lease, and what it notes."""
        await self.ground.write_canary()
        await lease.renew(self.ground.engine, self.token, None)
        await self.project.db.execute("update tailrace.lanes set moved_at = clock_timestamp()")

    async def caught_up(self) -> None:
        """Tick until all of the log has been read; at least twice."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.reading.tick()
            await self.reading.tick()
            while (slot := self.reading.slot()) is None or slot["lag_bytes"]:
                await asyncio.sleep(0.01)
                await self.reading.tick()

    @contextmanager
    def written(self) -> Iterator[list[str]]:
        """List what is written meanwhile, but for canaries."""
        statements: list[str] = []

        def note(_: Any, __: Any, statement: str, *___: Any) -> None:
            if WRITES.match(statement) and "tailrace.canary" not in statement:
                statements.append(statement)

        event.listen(self.ground.engine.sync_engine, "before_cursor_execute", note)
        try:
            yield statements
        finally:
            event.remove(self.ground.engine.sync_engine, "before_cursor_execute", note)


@pytest.fixture
async def own(shared: Servers, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Own]:
    async def choose(*_: object) -> Transport:
        return Transport(kind, "the test wants it")

    monkeypatch.setattr("worker.reading.proven.choose_transport", choose)
    # What is due is due at once, and what may wait while nothing happens waits for longer than the test.
    monkeypatch.setattr("worker.reading.proven.ADVANCE_SECONDS", 0.0)
    monkeypatch.setattr("worker.reading.proven.IDLE_ADVANCE_SECONDS", 3600.0)
    environment = {"WORKER_DELIVERY": "proven", "WORKER_CANARY_SECONDS": "10"}
    async with project(shared, shop.TABLES, "tests.e2e.shop", **environment) as made:
        await made.db.execute(EVERYTHING)
        async with reading(made) as one:
            yield one


@asynccontextmanager
async def reading(made: Project) -> AsyncIterator[Own]:
    settings = made.settings
    engine = make_engine(made.database_url, name="test")
    redis: Redis = Redis(connection_pool=connection_pool(made.servers.redis.url))
    handlers, catalogue = await load_handlers(settings, engine, "proven")

    async def enqueue(_: Lane) -> None:
        """Nobody drains here."""

    ground = Ground(
        settings=settings,
        engine=engine,
        lanes=Lanes(redis, settings.queue),
        handlers=tuple(handlers),
        catalogue=catalogue,
        enqueue=enqueue,
        alive=lambda: None,
        trouble=lambda _: None,
    )
    token = lease.new_name()
    assert await lease.take(engine, token, "test")
    one = Own(made, ground, token)
    await one.reading.begin()
    running = asyncio.create_task(one.reading.run(), name="test: reading")
    try:
        yield one
    finally:
        running.cancel()
        await asyncio.wait({running})
        await made.until(
            "select count(*) from pg_replication_slots where slot_name = 'tailrace' and active", 0
        )
        await made.db.execute("select pg_drop_replication_slot('tailrace')")
        await redis.aclose(close_connection_pool=True)
        await engine.dispose()


async def test_own_writes_are_no_reason_to_write(own: Own) -> None:
    await own.caught_up()
    before = await own.confirmed()
    with own.written() as written:
        for _ in range(5):
            await own.write()
            written.clear()
            await own.caught_up()
            assert written == []
    assert await own.confirmed() == before
    # Others' commits are one, though no handler wants them: the log must not be kept for ever.
    await own.project.db.execute("insert into elsewhere values (1)")
    await own.caught_up()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await own.confirmed() == before:
            await own.reading.tick()
