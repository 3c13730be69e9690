"""A proven reading in the test's own process: the test decides when it looks after itself."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from sqlalchemy import event

from tests.integration.wal.bench import Kind
from tests.stack import DEADLINE_SECONDS, Project
from worker import lease
from worker.catalogue import read_catalogue
from worker.database import make_engine
from worker.lanes import Lane, Lanes
from worker.queue import connection_pool
from worker.reading import Ground, ProvenReading
from worker.registry import Handler
from worker.source import RereadError
from worker.wal import Transport

WRITES = re.compile(r"\s*(with .*)?(insert|update|delete)\b|.*pg_replication_slot_advance", re.DOTALL)
UNASKED = ("tailrace.canary", "update tailrace.backfills set state = 'running'")


class Listening:
    """A reading, and what is around it."""

    def __init__(self, project: Project, ground: Ground, token: str) -> None:
        self.project = project
        self.ground = ground
        self.token = token
        self.reading = ProvenReading(ground, token)
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin a reading, and read."""
        await self.reading.begin()
        self._running = asyncio.create_task(self.read(), name="test: reading")

    async def stop(self) -> None:
        """Read no more."""
        if self._running is not None:
            self._running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._running

    async def start_again(self) -> None:
        """Begin another reading, as after a restart."""
        await self.stop()
        self.reading = ProvenReading(self.ground, self.token)
        await self.start()

    async def read(self) -> None:
        """Read, and read again where that is asked for: a machine under load may lose a connection."""
        while True:
            try:
                await self.reading.run()
            except* RereadError:
                pass
            while True:
                again = ProvenReading(self.ground, self.token)
                try:
                    await again.begin()
                except RereadError as error:
                    await asyncio.sleep(error.seconds)
                else:
                    self.reading = again
                    break

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
        """List what is written meanwhile; not canaries, and not looks for a backfill, which find none."""
        statements: list[str] = []

        def note(_: Any, __: Any, statement: str, *___: Any) -> None:
            if WRITES.match(statement) and not any(one in statement for one in UNASKED):
                statements.append(statement)

        event.listen(self.ground.engine.sync_engine, "before_cursor_execute", note)
        try:
            yield statements
        finally:
            event.remove(self.ground.engine.sync_engine, "before_cursor_execute", note)


def choose(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> None:
    """Have the log read by this transport."""

    async def chosen(*_: object) -> Transport:
        return Transport(kind, "the test wants it")

    monkeypatch.setattr("worker.reading.proven.choose_transport", chosen)


@asynccontextmanager
async def listening(made: Project, handlers: Sequence[Handler]) -> AsyncIterator[Listening]:
    """Read for these handlers."""
    settings = made.settings
    engine = make_engine(made.database_url, name="test")
    redis: Redis = Redis(connection_pool=connection_pool(made.servers.redis.url))
    names = {(one.schema, one.table) for handler in handlers for one in handler.subscriptions}
    async with engine.connect() as connection:
        catalogue = await read_catalogue(connection, settings.publication, names)

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
    one = Listening(made, ground, token)
    try:
        await one.start()
        yield one
    finally:
        await one.stop()
        await made.until(
            "select count(*) from pg_replication_slots where slot_name = 'tailrace' and active", 0
        )
        await made.db.execute("select pg_drop_replication_slot('tailrace')")
        await redis.aclose(close_connection_pool=True)
        await engine.dispose()
