"""A real PostgreSQL for the whole session, and for each test a database of its own with a running feed."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from standin.changes import Binding, ChangeFeed, Delivery
from standin.embedded import EmbeddedPostgres, bootstrap_supabase

SERVICE = {"role": "service_role"}
DEADLINE_SECONDS = 30
_numbers = itertools.count()


@pytest.fixture(scope="session")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    directory: Path = tmp_path_factory.mktemp("postgres")
    async with EmbeddedPostgres(directory) as server:
        yield server


@pytest.fixture
async def dsn(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    name = f"changes_{next(_numbers)}"
    admin = await asyncpg.connect(postgres.dsn())
    await admin.execute(f"create database {name}")
    await bootstrap_supabase(postgres.dsn(name))
    yield postgres.dsn(name)
    await admin.execute(f"drop database {name} with (force)")
    await admin.close()


@pytest.fixture
async def db(dsn: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(dsn)
    await connection.execute("create table marker (id int primary key)")
    await connection.execute("alter publication supabase_realtime add table marker")
    yield connection
    await connection.close()


class Watch:
    """A running feed and what it delivered, per subscriber."""

    def __init__(self, dsn: str, db: asyncpg.Connection, **options: Any) -> None:
        self.db = db
        self.raw: list[Delivery] = []
        self.resubscribed: asyncio.Queue[Hashable] = asyncio.Queue()
        self.refused: asyncio.Queue[tuple[Hashable, Exception]] = asyncio.Queue()
        self._arrived = asyncio.Condition()
        self._markers = itertools.count(1)

        async def on_resubscribed(subscriber: Hashable) -> None:
            self.resubscribed.put_nowait(subscriber)

        async def on_refused(subscriber: Hashable, refusal: Exception) -> None:
            self.refused.put_nowait((subscriber, refusal))

        self.feed = ChangeFeed(
            dsn,
            deliver=self._deliver,
            poll_interval=0.005,
            on_resubscribed=on_resubscribed,
            on_resubscribe_failed=on_refused,
            **options,
        )

    async def _deliver(self, deliveries: Sequence[Delivery]) -> None:
        async with self._arrived:
            self.raw += deliveries
            self._arrived.notify_all()

    async def subscribe(
        self,
        subscriber: Hashable,
        table: str | None,
        *,
        event: str = "*",
        schema: str = "public",
        filter: str | None = None,  # noqa: A002 - its name in the protocol
        select: tuple[str, ...] | None = None,
        claims: Mapping[str, Any] = SERVICE,
    ) -> None:
        binding = Binding(event, schema, table, filter, select)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.feed.subscribe(subscriber, [binding], claims)

    async def settled(self) -> None:
        """Return when everything committed before has been delivered."""
        await self.subscribe("marker", "marker")
        number = next(self._markers)
        await self.db.execute("insert into marker values ($1)", number)
        await self.until(
            lambda: any(
                d.subscriber == "marker" and json.loads(d.data)["record"] == {"id": number} for d in self.raw
            )
        )

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS), self._arrived:
            await self._arrived.wait_for(condition)

    async def texts(self, subscriber: Hashable) -> list[str]:
        await self.settled()
        return [d.data.decode() for d in self.raw if d.subscriber == subscriber]

    async def frames(self, subscriber: Hashable) -> list[dict[str, Any]]:
        return [json.loads(text) for text in await self.texts(subscriber)]

    async def brief(self, subscriber: Hashable) -> list[tuple[Any, ...]]:
        """Type, record and old record of each frame."""
        return [(f["type"], f.get("record"), f.get("old_record")) for f in await self.frames(subscriber)]


@contextlib.asynccontextmanager
async def watching(dsn: str, db: asyncpg.Connection, **options: Any) -> AsyncIterator[Watch]:
    watch = Watch(dsn, db, **options)
    task = asyncio.create_task(watch.feed.run())
    try:
        yield watch
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def watching_with(dsn: str, db: asyncpg.Connection) -> Any:
    return lambda **options: watching(dsn, db, **options)


@pytest.fixture
async def watch(dsn: str, db: asyncpg.Connection) -> AsyncIterator[Watch]:
    async with watching(dsn, db) as running:
        yield running
