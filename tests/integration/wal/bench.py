"""A database of each test's own with a slot, and readers on it."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.stack import Servers, execute
from worker.change import Position, RawChange
from worker.database import make_engine
from worker.wal import Reader, Transport, WalBatch, open_reader
from worker.wal.slot import SlotState, create_slot, read_slot
from worker.wal.type_names import TypeNames

Kind = Literal["stream", "windows"]
PUBLICATION = "supabase_realtime"
DEADLINE_SECONDS = 30.0
_numbers = itertools.count(1)


@dataclass
class Reading:
    """A reader, and all that it has handed over."""

    reader: Reader
    batches: list[WalBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin_again()

    def begin_again(self) -> None:
        """Go on with the same reader after it has failed."""
        self._source = self.reader.read()

    @property
    def changes(self) -> list[tuple[Position, RawChange]]:
        return [change for batch in self.batches for change in batch.changes]

    @property
    def rows(self) -> list[RawChange]:
        return [change for _, change in self.changes]

    @property
    def read_to(self) -> int:
        return self.batches[-1].read_to if self.batches else 0

    async def more(self) -> WalBatch:
        async with asyncio.timeout(DEADLINE_SECONDS):
            batch = await anext(self._source)
        self.batches.append(batch)
        return batch

    async def until(self, enough: Callable[["Reading"], bool]) -> "Reading":
        while not enough(self):
            await self.more()
        return self

    async def count(self, number: int) -> list[RawChange]:
        """Read until so many changes have come and their transaction is complete."""
        await self.until(lambda one: len(one.changes) >= number and not one.batches[-1].open)
        assert len(self.changes) == number
        return self.rows

    async def to(self, lsn: int) -> list[RawChange]:
        """Read until everything below an LSN has been handed over."""
        await self.until(lambda one: one.read_to >= lsn)
        return self.rows

    async def close(self) -> None:
        await self._source.aclose()  # type: ignore[attr-defined] # it is a generator
        await self.reader.close()


@dataclass
class Log:
    """A database with a slot."""

    url: str
    db: asyncpg.Connection
    engine: AsyncEngine
    slot: str
    names: TypeNames

    async def now(self) -> int:
        """Give the LSN that the log has reached."""
        # What has committed is flushed: the tests wait for each commit.
        lsn: int = await self.db.fetchval("select pg_current_wal_flush_lsn()")
        return lsn

    async def state(self) -> SlotState:
        async with self.engine.connect() as connection:
            state = await read_slot(connection, self.slot)
        assert state is not None
        return state

    async def until_confirmed(self, lsn: int) -> None:
        """Wait until the slot stands at least there; the stream's server says nothing when it moves it."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (await self.state()).confirmed < lsn:
                await asyncio.sleep(0.02)

    async def until_free(self) -> None:
        """Wait until nobody reads from the slot: the end of a backend sends no signal."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (await self.state()).active_pid is not None:
                await asyncio.sleep(0.01)

    async def open(self, kind: Kind) -> Reading:
        transport = Transport(kind, "the test wants it")
        reader = await open_reader(
            transport,
            url=self.url,
            engine=self.engine,
            slot=self.slot,
            publication=PUBLICATION,
            names=self.names,
        )
        return Reading(reader)

    @asynccontextmanager
    async def reading(self, kind: Kind) -> AsyncIterator[Reading]:
        reading = await self.open(kind)
        try:
            yield reading
        finally:
            await reading.close()


@asynccontextmanager
async def database(servers: Servers, tables: str = "") -> AsyncIterator[Log]:
    """Make a database with an own slot; tables are made before the slot."""
    number = next(_numbers)
    name, slot = f"wal_{number}", f"wal_{number}"
    postgres = servers.postgres
    await execute(postgres.dsn(), f"create database {name} template template0")
    url = postgres.dsn(name)
    db: Any = await asyncpg.connect(url)
    engine = make_engine(url, name="test")
    made = Log(url, db, engine, slot, TypeNames(engine))
    try:
        await db.execute(f"create publication {PUBLICATION} with (publish_via_partition_root = false)")
        await db.execute(tables or "select")
        async with engine.connect() as connection:
            await create_slot(connection, slot)
        yield made
    finally:
        db = made.db  # a test that stops the server has another
        await engine.dispose()
        await db.execute(
            "select pg_terminate_backend(active_pid, 5000) from pg_replication_slots where slot_name = $1",
            slot,
        )
        await db.execute(
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1", slot
        )
        await db.close()
        await execute(postgres.dsn(), f"drop database {name} with (force)")


ORDERS = """
create table orders (id int primary key, customer int, note text, total numeric(10, 2));
alter publication supabase_realtime add table orders;
"""
