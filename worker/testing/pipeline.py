"""The whole pipeline within a test: listener and worker on a database of the test's own, in the test's loop.

So a breakpoint in a handler works, and what a test replaces is replaced. Delivery is proven, from a slot. No
Realtime is there, which would only ring, and no arq, whose part is to start what is begun here directly.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, Self

from redis.asyncio import Redis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker import lease
from worker.database import make_engine
from worker.delivery import Choice
from worker.draining.workshop import Workshop
from worker.lanes import Lane
from worker.listener import Listener
from worker.queue import connection_pool
from worker.testing.rows import Rows
from worker.testing.stack import Database, Stack, same_loop
from worker.testing.writes import Write

READY_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 30.0
LOOK_SECONDS: Final = 0.01
"""Between looks at what Postgres and Redis say: neither sends a signal for "nothing is left"."""

_WAITING = text(
    "select handler, status, count(*) as rows, max(error_class) as error_class, max(error) as error,"
    " max(traceback) as traceback from tailrace.held group by handler, status order by handler, status"
)
_APPLIED = text(
    "select (select coalesce(sum(applied), 0) from tailrace.lanes), count(*)"
    " from tailrace.backfills where state <> 'done'"
)


class NotSettledError(AssertionError):
    """What was written has not been applied: a handler gave up a change, or something still waits."""


class Pipeline:
    """A listener and a worker; the fixture `pipeline`. `settle` is a fixture of its own, too."""

    def __init__(self, stack: Stack, database: Database) -> None:
        self._servers = stack
        self._template = database
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: BaseException | None = None
        self._loop = asyncio.get_running_loop()
        self._lsn = 0
        self._database: Database
        self._engine: AsyncEngine
        self._redis: Redis
        self._listener: Listener
        self._workshop: Workshop

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        push = self._stack.push_async_callback
        self._database = await self._servers.copy(self._template)
        push(self._servers.drop, self._database)
        settings = self._database.settings
        self._engine = make_engine(self._database.url, name="tailrace tests", size=10)
        push(self._engine.dispose)
        self._redis = Redis(connection_pool=connection_pool(self._database.redis_url))
        push(self._redis.aclose, close_connection_pool=True)
        self._workshop = await self._stack.enter_async_context(Workshop.open(settings, self._begin))
        # Before all that they use is closed.
        push(self._end)
        self._listener = Listener(
            settings,
            Choice("proven", "the pipeline of a test"),
            engine=self._engine,
            redis=self._redis,
            handlers=self._workshop.handlers,
            catalogue=self._database.catalogue,
            enqueue=self._begin,
        )
        self._start(self._listener.run(), "listener")
        for work, name in self._workshop.tasks():
            self._start(work, name)
        await self._until_ready()

    async def _begin(self, lane: Lane) -> None:
        self._workshop.draining.begin(lane)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=f"tailrace tests: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._broken = task.exception()

    async def _end(self) -> None:
        await self._workshop.draining.stop(self._database.settings.drain_seconds)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_ready(self) -> None:
        until = time.monotonic() + READY_SECONDS
        reasons: list[str] = []
        while time.monotonic() < until:
            self._check()
            ready, reasons = await self._listener.ready()
            if ready:
                return
            await asyncio.sleep(LOOK_SECONDS)
        raise NotSettledError(f"the pipeline is not ready after {READY_SECONDS:.0f} s: {'; '.join(reasons)}")

    def _check(self) -> None:
        same_loop(self._loop)
        if self._broken is not None:
            raise NotSettledError(f"listener or worker has ended: {self._broken!r}") from self._broken

    @property
    def engine(self) -> AsyncEngine:
        """An engine of the database, for whatever a test wants to do there."""
        return self._engine

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Open a session, whose commits are the application's."""
        async with AsyncSession(self._engine, expire_on_commit=False) as session:
            yield session

    async def write(self, *writes: Write) -> None:
        """Commit writes of `insert`, `update` and `delete` as one transaction of the application."""
        self._check()
        self._lsn += 1
        async with self._engine.connect() as connection:
            rows = Rows(
                connection, dict(self._database.catalogue.tables), self._database.settings.publication
            )
            for ordinal, write in enumerate(writes):
                await rows.write(write, self._lsn, ordinal)
            await connection.commit()

    async def settle(self, seconds: float = SETTLE_SECONDS) -> None:
        """Wait until all that was committed is applied, and all that handlers have written because of it.

        Raises:
            NotSettledError: a handler gave up a change, with its traceback; or something waits still.
        """
        until = time.monotonic() + seconds
        applied = -1
        while True:
            await self._until_read(until, seconds)
            before, applied = applied, await self._until_applied(until, seconds)
            # What handlers have written may be a change for others: the last round is one that adds nothing.
            if before == applied:
                return

    async def _until_read(self, until: float, seconds: float) -> None:
        """Wait until the log has been read, and is in the lanes, up to a commit of now."""
        async with self._engine.begin() as connection:
            now: int = (
                await connection.execute(text("select (pg_current_wal_insert_lsn() - '0/0')::int8"))
            ).scalar_one()
            # A commit that is read for certain: of others nobody says that there was nothing.
            await connection.execute(
                text("update tailrace.canary set token = :token"), {"token": lease.new_name()}
            )
        while (self._listener.read_to() or 0) <= now:
            self._check()
            if time.monotonic() > until:
                _, reasons = await self._listener.ready()
                why = "; ".join(reasons) or "it lags"
                raise NotSettledError(f"the log was not read within {seconds:g} s: {why}")
            await asyncio.sleep(LOOK_SECONDS)

    async def _until_applied(self, until: float, seconds: float) -> int:
        """Wait until nothing is queued or held any more; returns how many changes have ever been applied."""
        while True:
            self._check()
            queued = await self._listener.queued()
            async with self._engine.connect() as connection:
                waiting = (await connection.execute(_WAITING)).mappings().all()
                applied, backfills = (await connection.execute(_APPLIED)).one()
            for row in waiting:
                if row["status"] == "dead":
                    raise NotSettledError(
                        f"{row['handler']} gave up {row['rows']} change(s):\n{row['traceback']}"
                    )
            if not queued and not waiting and not backfills:
                return int(applied)
            if time.monotonic() > until:
                what = [
                    f"{row['rows']} of {row['handler']} {row['status']} ({row['error']})" for row in waiting
                ]
                what += [f"{queued} queued"] if queued else []
                what += [f"{backfills} backfill(s)"] if backfills else []
                raise NotSettledError(f"not settled within {seconds:g} s; still there: {', '.join(what)}")
            await asyncio.sleep(LOOK_SECONDS)
