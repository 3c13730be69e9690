"""Drains, lanes and journal on real servers, without processes: tests decide who makes a pass, and when."""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

import asyncpg
import structlog
from redis.asyncio import Redis
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.util import await_only

from tests.stack import Servers, _template, execute
from worker import driver, lease, positions
from worker.cache import Cache
from worker.catalogue import Catalogue, read_catalogue
from worker.change import Context, Position, RawChange
from worker.database import make_engine
from worker.draining.calls import Caller
from worker.draining.drain import Drain
from worker.draining.items import Decoder
from worker.draining.passes import Pass, Progress
from worker.draining.trims import SECONDS as TRIM_SECONDS
from worker.draining.trims import Trims
from worker.draining.turns import Draining
from worker.lane_writer import LaneWriter
from worker.lanes import Lane, Lanes, News
from worker.positions import Limits
from worker.queue import connection_pool
from worker.reading import layout
from worker.reading.journal import Clock, Journal
from worker.registry import Handler, Handlers
from worker.retries import Backoff, Policy
from worker.routing import Router
from worker.schema_watch import SchemaWatch

TABLES = """
create table items (id integer primary key, grp integer, note text, primary_note text);
alter table items replica identity full;
create table pairs (a integer, b uuid, amount numeric, primary key (a, b));
alter table pairs replica identity full;
create table derived_log (n bigserial primary key, handler text, position text, id integer, note text);
create table derived_parents (id integer primary key);
create table derived_children (
    id integer primary key,
    parent integer references derived_parents deferrable initially deferred
);
"""
COLUMNS = {
    "items": {"id": "int4", "grp": "int4", "note": "text"},
    "pairs": {"a": "int4", "b": "uuid", "amount": "numeric"},
}
_numbers = itertools.count(1)


class Bench:
    """One database, one queue, one generation at a time."""

    def __init__(
        self, engine: AsyncEngine, redis: Redis, db: asyncpg.Connection, lane_count: int, prefix: str
    ) -> None:
        self.engine = engine
        self.redis = redis
        self.db = db
        self.lane_count = lane_count
        self.lanes = Lanes(redis, prefix)
        self.enqueued: list[Lane] = []
        self.token = lease.new_name()
        self.handlers: tuple[Handler, ...] = ()
        self.catalogue: Catalogue
        self.journal: Journal
        self.writer: LaneWriter
        self.router: Router
        self.traces: Any = None

    async def load(self, on: Handlers) -> None:
        """Take these handlers, and begin a generation."""
        self.handlers = on.handlers()
        names = {(one.schema, one.table) for handler in self.handlers for one in handler.subscriptions}
        async with self.engine.connect() as connection:
            self.catalogue = await read_catalogue(connection, "supabase_realtime", names)
        self.watch = SchemaWatch(self.engine, self.catalogue, "supabase_realtime", names)
        assert await lease.take(self.engine, self.token, "bench")
        self.router = Router(self.handlers, self.catalogue, self.lane_count)
        await self.begin()

    async def begin(self) -> None:
        """Begin a generation."""
        clock = Clock(Position(1, 0))
        present = clock.next()
        self.writer = LaneWriter(self.lanes, lease.new_name(), self.token, present)
        await self.writer.begin()
        async with self.engine.begin() as connection:
            await layout.agree(
                connection, self.handlers, self.lane_count, present, resumed=present, settled=True
            )
            await lease.set_generation(connection, self.token, self.writer.generation, present)
        self.journal = Journal(
            engine=self.engine,
            lanes=self.lanes,
            writer=self.writer,
            token=self.token,
            clock=clock,
            tables=sorted(self.router.tables),
            lane_count=self.lane_count,
            enqueue=self.enqueue,
            traces=self.traces,
        )

    async def enqueue(self, lane: Lane) -> None:
        self.enqueued.append(lane)

    # What the source would say

    def take(self, table: str, new: dict[str, Any] | None, old: dict[str, Any] | None = None) -> None:
        """Take in a change; `flush` of the journal writes it."""
        raw = raw_change(table, new, old)
        routes = self.router.route(raw)
        assert not routes.unroutable
        self.journal.add(raw, routes.matched, time.time())

    async def put(self, table: str, new: dict[str, Any] | None, old: dict[str, Any] | None = None) -> None:
        """Write a change into its lanes."""
        self.take(table, new, old)
        await self.journal.flush()

    # Workers

    def drain(
        self,
        name: str,
        *,
        batch: int = 500,
        timeout: float = 5.0,
        max_attempts: int = 1_000,
        cache: Cache | None = None,
        trims: Trims | None = None,
        idle_ms: int = 60_000,
    ) -> Drain:
        """Make a drain, as one worker process has it."""
        handler = next(one for one in self.handlers if one.name == name)
        return make_drain(
            handler,
            self.engine,
            self.lanes,
            self.watch,
            batch=batch,
            timeout=timeout,
            max_attempts=max_attempts,
            cache=cache,
            traces=self.traces,
            trims=trims,
            idle_ms=idle_ms,
        )

    def worker(self, name: str) -> Draining:
        """Make the draining part of a worker."""
        trims = Trims(self.lanes, TRIM_SECONDS)
        return Draining(
            name=name,
            engine=self.engine,
            lanes=self.lanes,
            drains={one.name: self.drain(one.name, trims=trims) for one in self.handlers},
            enqueue=self.enqueue,
            at_once=4,
            trims=trims,
        )

    async def settle(self, *drains: Drain, most: int = 400) -> None:
        """Make passes in turn over all lanes until none does anything any more."""
        for _ in range(most):
            await self.make_due()
            ended = [
                (await drain.run(Lane(drain.handler.name, number))).ended
                for drain in drains
                for number in range(self.lane_count)
            ]
            waiting = await self.db.fetchval("select count(*) from tailrace.held where status = 'retrying'")
            if not waiting and all(one is Pass.EMPTY for one in ended):
                return
        raise AssertionError(f"the lanes do not come to rest: {ended}, {waiting} held")

    async def make_due(self) -> None:
        """Let the time come at which held changes are tried again."""
        await self.db.execute(
            "update tailrace.held set next_attempt_at = now()"
            " where next_attempt_at > now() and status = 'retrying'"
        )

    @asynccontextmanager
    async def session(self) -> AsyncIterator[asyncpg.Connection]:
        """Make a connection of its own, which may be ended by others; its transactions may not be idle."""
        url = self.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        limits = {"idle_in_transaction_session_timeout": "100"}
        connection = await asyncpg.connect(url, server_settings=limits)
        try:
            yield connection
        finally:
            connection.terminate()

    # What came of it

    async def log(self, column: str = "id") -> list[Any]:
        return [row[0] for row in await self.db.fetch(f"select {column} from derived_log order by n")]

    async def rows(self, table: str, columns: str = "*") -> list[tuple[Any, ...]]:
        return [
            tuple(row) for row in await self.db.fetch(f"select {columns} from tailrace.{table} order by 1")
        ]

    async def count(self, query: str) -> int:
        return int(await self.db.fetchval(f"select count(*) from {query}"))

    async def counters(self) -> tuple[int, int, int]:
        """Return applied, held (dead ones too) and queued, in changes; what was read must add up to it."""
        read, applied = await self.db.fetchrow(
            "select coalesce(sum(read), 0), coalesce(sum(applied), 0) from tailrace.lanes"
        )
        waiting = await self.db.fetchval("select coalesce(sum(changes), 0) from tailrace.held")
        assert read == applied + waiting
        return int(applied), int(waiting), (await self.journal.backlog()).entries

    async def holding_is_true(self) -> bool:
        """Compare what lanes say they hold with what is held."""
        wrong = await self.db.fetch(
            "select l.handler, l.lane from tailrace.lanes l where l.holding <> (select count(*)"
            " from tailrace.held h where h.handler = l.handler and l.lane = any(h.lanes)"
            " and waits) or l.parked <> (select count(*) from tailrace.held h"
            " where h.handler = l.handler and l.lane = h.lanes[1] and status = 'parked')"
        )
        return not wrong

    def lane_of(self, handler: str, new: dict[str, Any]) -> Lane:
        """Tell in which lane a row is."""
        matched = self.router.route(raw_change("items", new, None)).matched
        return Lane(handler, next(one.lanes[0] for one in matched if one.handler.name == handler))

    async def told(self, handler: str, numbers: Iterable[int]) -> dict[Lane, News]:
        """Tell what bells would tell of these lanes, had nothing of it been heard yet."""
        news, generation = {}, self.writer.generation
        for lane in (Lane(handler, number) for number in numbers):
            query = "select lsn, ordinal from tailrace.lanes where handler = $1 and lane = $2"
            stands = Position(*await self.db.fetchrow(query, handler, lane.number))
            found = await self.lanes.read(generation, lane, stands, 100)
            news[lane] = News(self.lanes.base(generation), found.reads)
        return news

    def groups(self, handler: str) -> list[int]:
        """Name one value of `grp` for each lane of a handler that has it as key, in lane order."""
        found: dict[int, int] = {}
        for grp in itertools.count(1):
            found.setdefault(self.lane_of(handler, item(1, grp)).number, grp)
            if len(found) == self.lane_count:
                return [found[number] for number in range(self.lane_count)]
        raise AssertionError

    @contextmanager
    def killed_at(self, step: int) -> Iterator[list[int]]:
        """Have Postgres end the connection before the statement of this number; yields how many came."""
        seen = [0]
        sync = self.engine.sync_engine

        def strike(connection: Connection) -> None:
            seen[0] += 1
            if seen[0] == step:
                driver = connection.connection.driver_connection
                assert driver is not None
                pid = driver.get_server_pid()
                await_only(self._terminate(pid))

        def before(connection: Connection, *_: object) -> None:
            strike(connection)

        async def run(session: AsyncSession, statement: str, *arguments: object) -> Any:
            await (await session.connection()).run_sync(strike)
            return await driver.run(session, statement, *arguments)

        event.listen(sync, "before_cursor_execute", before)
        event.listen(sync, "commit", strike)
        positions.run = run  # type: ignore[attr-defined] # what goes by the driver fires no event
        try:
            yield seen
        finally:
            positions.run = driver.run  # type: ignore[attr-defined]
            event.remove(sync, "before_cursor_execute", before)
            event.remove(sync, "commit", strike)

    @contextmanager
    def before_commit(self, what: Callable[[], Awaitable[Any]]) -> Iterator[None]:
        """Have something done when the next transaction has done all but commit."""
        sync = self.engine.sync_engine
        left = [what]

        def strike(_: Connection) -> None:
            if left:
                await_only(left.pop()())

        event.listen(sync, "commit", strike)
        try:
            yield
        finally:
            event.remove(sync, "commit", strike)
        assert not left

    async def _terminate(self, pid: int) -> None:
        await self.db.fetchval("select pg_terminate_backend($1, 5000)", pid)


def make_drain(
    handler: Handler,
    engine: AsyncEngine,
    lanes: Lanes,
    watch: SchemaWatch,
    *,
    batch: int = 500,
    timeout: float = 5.0,
    max_attempts: int = 1_000,
    cache: Cache | None = None,
    traces: Any = None,
    trims: Trims | None = None,
    idle_ms: int = 60_000,
) -> Drain:
    """Make a drain of a handler, as one worker process has it."""
    made = cache or Cache(lanes.redis, handler.name, ())
    caller = Caller(
        handler,
        timeout=handler.timeout or timeout,
        policy=Policy(Backoff(3600.0, 3600.0, lambda: 1.0), max_attempts, halts=handler.after == "halt"),
        context=lambda key: Context(lanes.redis, structlog.get_logger(), key, _no_client, lambda: made),
        cached=made.tables,
        traces=traces,
    )
    return Drain(
        engine=engine,
        trims=trims or Trims(lanes),
        caller=caller,
        decoder=Decoder(handler, watch),
        limits=Limits(idle_ms, 0),
        batch=batch,
    )


def _no_client() -> NoReturn:
    raise AssertionError("no handler of these tests asks for Supabase")


def item(id_: int, grp: int | None, note: str = "") -> dict[str, Any]:
    return {"id": id_, "grp": grp, "note": note}


def raw_change(table: str, new: dict[str, Any] | None, old: dict[str, Any] | None) -> RawChange:
    kind = "DELETE" if new is None else "INSERT" if old is None else "UPDATE"
    payload = {
        "schema": "public",
        "table": table,
        "type": kind,
        "columns": [{"name": name, "type": type_} for name, type_ in COLUMNS[table].items()],
        "record": new,
        "old_record": old,
        "commit_timestamp": "2026-01-01T00:00:00.000Z",
        "errors": None,
    }
    return RawChange.decode("realtime", json.dumps(payload).encode())


@asynccontextmanager
async def bench(shared: Servers, *, lanes: int = 4) -> AsyncIterator[Bench]:
    """Make a bench with a database of its own."""
    await _template(shared.postgres)
    number = next(_numbers)
    name = f"bench_{number}"
    await execute(shared.postgres.dsn(), f"create database {name} template tailrace_template")
    url = shared.postgres.dsn(name)
    db = await asyncpg.connect(url)
    engine = make_engine(url, name="bench")
    redis: Redis = Redis(connection_pool=connection_pool(shared.redis.url))
    try:
        await db.execute(TABLES)
        yield Bench(engine, redis, db, lanes, f"bench{number}")
    finally:
        await redis.aclose(close_connection_pool=True)
        await engine.dispose()
        await db.close()
        await execute(shared.postgres.dsn(), f"drop database {name} with (force)")


async def at_once(*passes: Callable[[], Any]) -> list[Progress]:
    """Make passes at the same time."""
    return list(await asyncio.gather(*(one() for one in passes)))
