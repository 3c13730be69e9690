"""An embedded Postgres and an embedded Redis for a test run, and databases on them.

They run on a loop of their own in a thread of their own: whatever loops the tests have, none of them owns a
server. The servers end with this process, however it ends.
"""

import asyncio
import itertools
import shutil
import tempfile
import threading
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from sqlalchemy import MetaData, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from config.settings import Settings, given_settings
from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase
from worker import loader, runtime
from worker.catalogue import Catalogue, quote
from worker.database import make_engine
from worker.errors import ConfigurationError
from worker.fitting import load_handlers
from worker.registry import Handler

Tables = str | Path | MetaData
"""SQL, a file of SQL, or what SQLAlchemy makes tables of."""

_Result = TypeVar("_Result")
_NOBODY: Final = "sb_secret_of_the_tests"
_NOWHERE: Final = "http://127.0.0.1:9"
_numbers = itertools.count(1)


def same_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Check that a fixture is used in the event loop in which it was made: its connections know no other.

    Raises:
        RuntimeError: it is not, with what to configure.
    """
    if asyncio.get_running_loop() is not loop:
        raise RuntimeError(
            "the fixture was made in another event loop than the test runs in: in pytest's configuration,"
            " give both the same by asyncio_default_fixture_loop_scope and asyncio_default_test_loop_scope"
        )


class _Loop:
    """A loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tailrace: servers", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run a coroutine to its end, from any other thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()


class Database:
    """A database with the tests' tables and Tailrace's own, and the handlers that were held against it.

    Attributes:
        name: its name.
        url: its address.
        redis_url: address of the Redis that goes with it.
        handlers: what is tested.
        catalogue: of the handlers' tables.
        settings: those of the processes, without anything of the environment.
    """

    def __init__(
        self, name: str, settings: Settings, handlers: tuple[Handler, ...], catalogue: Catalogue
    ) -> None:
        self.name = name
        self.settings = settings
        self.handlers = handlers
        self.catalogue = catalogue
        self.url = settings.database_url.get_secret_value()
        self.redis_url = settings.redis_url.get_secret_value()


class Stack:
    """The servers. `with Stack() as stack:` starts and ends them.

    Attributes:
        database_url: of Postgres, as its superuser; tests have databases of their own on it.
        redis_url: of Redis.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tailrace-tests-"))
        # Postgres may run as another user than we do.
        self._folder.chmod(0o755)
        self._postgres = EmbeddedPostgres(self._folder / "postgres")
        self._redis = EmbeddedRedis(self._folder / "redis")
        self._loop = _Loop()

    def __enter__(self) -> Self:
        try:
            self._loop.run(self._start())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _start(self) -> None:
        await asyncio.gather(self._postgres.start(), self._redis.start())

    def close(self) -> None:
        """End the servers, and remove what they have written."""
        self._loop.run(self._stop())
        self._loop.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _stop(self) -> None:
        await asyncio.gather(self._postgres.stop(), self._redis.stop(), return_exceptions=True)

    @property
    def database_url(self) -> str:
        """Address of the server's first database, which no test uses."""
        return self._postgres.dsn()

    @property
    def redis_url(self) -> str:
        """Address of Redis."""
        return self._redis.url

    def prepare(self, tables: Tables | Iterable[Tables], handlers: str) -> Database:
        """Make a database as of a Supabase project, with these tables, Tailrace's, and the handlers' own.

        Args:
            tables: made in this order, before the migrations in the handlers' packages.
            handlers: what HANDLERS says.

        Raises:
            ConfigurationError: the handlers are wrong, or do not fit the tables.
        """
        listed = [tables] if isinstance(tables, (str, Path, MetaData)) else list(tables)
        modules = tuple(name.strip() for name in handlers.split(",") if name.strip())
        loader.load(modules)  # in the tests' own thread: it is their code that is imported
        return self._loop.run(self._prepare(listed, modules))

    async def _prepare(self, tables: Sequence[Tables], modules: tuple[str, ...]) -> Database:
        name = f"tailrace_{next(_numbers)}"
        await self._in_first(f"create database {name}")
        url = self._postgres.dsn(name)
        await bootstrap_supabase(url)
        settings = _settings(url, self.redis_url, modules, name)
        engine = make_engine(url, name="tailrace tests", size=1)
        try:
            for one in tables:
                await _make(engine, one)
            await runtime.upgrade(engine, settings)
            await _publish(engine, settings)
            handlers, catalogue = await load_handlers(settings, engine, "proven")
        except ConfigurationError as error:
            hint = "fixture tailrace_tables gives the tables that the tests have"
            raise ConfigurationError([*error.problems, hint]) from None
        finally:
            await engine.dispose()
        return Database(name, settings, handlers, catalogue)

    async def copy(self, database: Database) -> Database:
        """Make a copy of a database that nobody is connected to; called from any loop."""
        name = f"{database.name}_{next(_numbers)}"
        await self._elsewhere(self._in_first(f"create database {name} template {database.name}"))
        settings = _settings(self._postgres.dsn(name), self.redis_url, database.settings.handlers, name)
        return Database(name, settings, database.handlers, database.catalogue)

    async def drop(self, database: Database) -> None:
        """Remove a database, with its replication slot; called from any loop."""
        await self._elsewhere(self._drop(database.name, database.settings.slot))

    async def _drop(self, name: str, slot: str) -> None:
        await self._in_first(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity where datname = :name",
            "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = :slot",
            f"drop database {name} with (force)",
            name=name,
            slot=slot,
        )

    async def _elsewhere(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        return await asyncio.to_thread(self._loop.run, work)

    async def _in_first(self, *statements: str, **values: str) -> None:
        engine = make_engine(self._postgres.dsn(), name="tailrace tests", size=1)
        try:
            async with engine.connect() as connection:
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                for statement in statements:
                    await connection.execute(text(statement), values)
        finally:
            await engine.dispose()


def _settings(database_url: str, redis_url: str, handlers: tuple[str, ...], name: str) -> Settings:
    given: dict[str, Any] = {
        "supabase_url": _NOWHERE,
        "service_role_key": _NOBODY,
        "database_url": database_url,
        "redis_url": redis_url,
        "handlers": handlers,
        "queue": name,
        "slot": name,
        "delivery": "proven",
        # A test that fails is to fail soon.
        "backoff_seconds": 0.01,
        "backoff_max_seconds": 0.05,
        "max_attempts": 3,
        "lanes": 4,
        "canary_seconds": 1,
        "drain_seconds": 1,
    }
    return given_settings(**given)


async def _make(engine: AsyncEngine, tables: Tables) -> None:
    if isinstance(tables, MetaData):
        async with engine.begin() as connection:
            for schema in {table.schema for table in tables.tables.values() if table.schema}:
                await connection.execute(text(f"create schema if not exists {quote(schema)}"))
            await connection.run_sync(tables.create_all)
        return
    statements = tables.read_text(encoding="utf-8") if isinstance(tables, Path) else tables
    async with engine.connect() as connection:
        await _run_script(connection, statements)


async def _run_script(connection: AsyncConnection, statements: str) -> None:
    """Run several statements at once, which only the driver can."""
    driver: Any = (await connection.get_raw_connection()).driver_connection
    await driver.execute(statements)


async def _publish(engine: AsyncEngine, settings: Settings) -> None:
    """Put the handlers' tables into the publication. What is not there is told later."""
    wanted = {
        (one.schema, one.table) for handler in loader.load(settings.handlers) for one in handler.subscriptions
    }
    async with engine.begin() as connection:
        for schema, table in sorted(wanted):
            name = f"{quote(schema)}.{quote(table)}"
            known = await connection.scalar(
                text(
                    "select to_regclass(:name) is not null and not exists (select from pg_publication_tables"
                    " where pubname = :publication and schemaname = :schema and tablename = :table)"
                ),
                {"name": name, "publication": settings.publication, "schema": schema, "table": table},
            )
            if known:
                await connection.execute(
                    text(f"alter publication {quote(settings.publication)} add table {name}")
                )
