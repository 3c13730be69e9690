"""The processes: opens their resources, owns their signals and deadlines, returns their exit codes.

What they do between opening and closing is in listener.py and jobs.py.
"""

import asyncio
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import uvloop
from redis.asyncio import Redis
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from config.logging import configure_logging
from config.settings import Settings
from config.supervisor import read_supervisor
from worker import delivery, loader, telemetry
from worker.database import DATABASE_ERRORS, explain, make_engine, wait_until_up
from worker.delivery import UNPROTECTED
from worker.errors import ConfigurationError
from worker.fitting import load_handlers
from worker.hooks import Inbox
from worker.lanes import Lane, Lanes
from worker.listener import Listener
from worker.operating import Operations, waker
from worker.processes import announce, cancel_until_done, settle_memory
from worker.queue import PatientRedis, connection_pool
from worker.supervision import attend, end
from worker.tokens import Tokens
from worker.tracing import traces_of
from worker.wal.slot import judge, read_permission, read_server, read_slot
from worker.web import Bearer, Desk, desk_routes, health_app, hook_route, metrics_route, page_routes, serve

if TYPE_CHECKING:
    from alembic.config import Config
    from starlette.routing import Route

log = structlog.get_logger(__name__)

ROOT = Path(__file__).parent.parent
OWN_MIGRATIONS = ROOT / "migrations"
FORCE_SECONDS = 3.0
STARTING = "starting"
ARQ = ("arq", "worker.jobs.WorkerSettings")
"""What a worker is: a module, for arq's own script may lie anywhere, and its argument."""


def listen(settings: Settings) -> int:
    """Run the listener until SIGTERM or SIGINT."""
    configure_logging(settings)
    return uvloop.run(_until_signal(_listen(settings), settings.drain_seconds))


async def _listen(settings: Settings) -> None:
    loader.load(settings.handlers)  # what is wrong with the code is told before any waiting
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace listener", size=6)
    redis: Redis = Redis(connection_pool=connection_pool(settings.redis_url.get_secret_value()))
    arq = PatientRedis(settings.redis_url.get_secret_value(), queue=settings.queue)
    waiting = Waiting()
    try:
        closing = asyncio.Event()
        desk = desk_routes(_bearer(settings), lambda: waiting.desk)
        page = page_routes(waiting.status, closing, shown=settings.dashboard)
        routes = [metrics_route(waiting.samples), *page, *desk]
        routes += _hook_routes(settings, redis)
        app = health_app(waiting, routes)
        async with (
            traces_of(settings, "listener") as traces,
            serve(app, settings.health_host, settings.port, closing=closing) as served,
            AsyncExitStack() as stack,
        ):
            log.info("health of the listener", url=served.url)
            reports = asyncio.create_task(attend(read_supervisor(), waiting), name="listener: supervision")
            stack.push_async_callback(end, reports)
            await wait_until_up(engine, told=waiting.tell)
            choice = await _choose(settings, engine)
            handlers, catalogue = await load_handlers(settings, engine, choice.delivery)

            async def enqueue(lane: Lane) -> None:
                await announce(arq, settings.queue, lane)

            listener = Listener(
                settings,
                choice,
                engine=engine,
                redis=redis,
                handlers=handlers,
                catalogue=catalogue,
                enqueue=enqueue,
                traces=traces,
            )
            waiting.follow(listener)
            waiting.desk = Operations(engine, lambda: handlers, waker(Lanes(redis, settings.queue), enqueue))
            settle_memory()
            await listener.run()
    finally:
        arq.stopping = True
        await arq.aclose(close_connection_pool=True)
        await redis.aclose(close_connection_pool=True)
        await engine.dispose()


def _hook_routes(settings: Settings, redis: Redis) -> "list[Route]":
    """Make what takes webhooks, where they are the delivery; a stand-by takes them, too."""
    if settings.delivery != "webhooks":
        return []
    if settings.hook_secret is None:
        raise ConfigurationError([UNPROTECTED])
    inbox = Inbox(redis, settings.queue, settings.max_backlog)
    return [hook_route(settings.hook_secret.get_secret_value(), inbox.put)]


def _bearer(settings: Settings) -> Bearer:
    """Make what tells operators from others."""
    secret = None if settings.jwt_secret is None else settings.jwt_secret.get_secret_value()
    try:
        tokens = Tokens(settings.supabase_url, secret=secret)
    except ValueError as error:
        raise ConfigurationError([f"SUPABASE_JWT_SECRET cannot be used: {error}"]) from None
    return Bearer(tokens, allow=lambda identity: identity.may_operate(settings.operator_role))


async def _choose(settings: Settings, engine: AsyncEngine) -> delivery.Choice:
    """Choose the delivery by what is wanted and what the database allows."""
    async with engine.connect() as connection:
        permission = await read_permission(connection, settings.slot)
        judgement = judge(
            await read_slot(connection, settings.slot), await read_server(connection), recorded=None
        )
    return delivery.choose(
        settings.delivery,
        allowed=permission.allowed,
        why_not=permission.reason,
        taken=judgement.reason if judgement.finding == "foreign" else "",
    )


class Waiting:
    """Answers for the listener until there is one: probes must not be refused while Postgres is away."""

    def __init__(self) -> None:
        self._reason = STARTING
        self._listener: Listener | None = None
        self.desk: Desk | None = None
        """What operators may do; None while there is no listener."""

    def tell(self, reason: str) -> None:
        """Note why there is no listener yet."""
        self._reason = reason

    def follow(self, listener: Listener) -> None:
        """Let the listener answer from now on."""
        self._listener = listener

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether the process works."""
        return self._listener.live() if self._listener else (True, [])

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell whether the process can do its work."""
        return await self._listener.ready() if self._listener else (False, [self._reason])

    async def serves(self) -> tuple[bool, list[str]]:
        """Tell whether the process does its part, which may be to stand by."""
        return await self._listener.serves() if self._listener else (False, [self._reason])

    def doing(self) -> str:
        """Tell in a few words what the process does; nothing while it is still starting."""
        if self._listener is not None:
            return self._listener.doing()
        return "" if self._reason == STARTING else f"waiting: {self._reason}"

    def notes(self) -> list[str]:
        """Tell what else there is to know."""
        return self._listener.notes() if self._listener else []

    async def status(self) -> dict[str, object]:
        """Tell everything that is known."""
        if self._listener is None:
            return {"ready": False, "reasons": [self._reason], "delivery": None, "handlers": {}}
        return await self._listener.status()

    async def samples(self) -> list[telemetry.Sample]:
        """Tell it in numbers."""
        if self._listener is None:
            facts = telemetry.ListenerFacts(ready=False, leads=False)
            return telemetry.of_listener(facts, None)
        return await self._listener.samples()


async def _until_signal(work: Coroutine[None, None, None], seconds: float) -> int:
    """Run until the work ends or a signal asks for the end, which may take so many seconds."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    stopping = False

    def stop(number: signal.Signals) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            log.info("stopping", signal=number.name)
            loop.call_later(seconds + FORCE_SECONDS, os._exit, 0)
            cancel_until_done(task)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    try:
        await task
    except asyncio.CancelledError:
        if not stopping:
            raise
    log.info("stopped")
    return 0


def work(settings: Settings) -> int:
    """Run a worker, as the arq command does."""
    del settings  # read again by the module, as for the arq command
    from arq.worker import run_worker  # noqa: PLC0415 - only this command needs arq's worker

    from worker.jobs import worker_settings  # noqa: PLC0415 - as above

    run_worker(worker_settings())
    return 0


def run(settings: Settings) -> int:
    """Run migrations, a listener and a worker, as one process tree; ends when either ends."""
    configure_logging(settings)
    code = migrate(settings, sql=False)
    if code:
        return code
    return asyncio.run(_supervise([["worker", "listen"], ARQ], settings.drain_seconds + 2 * FORCE_SECONDS))


async def _supervise(modules: Sequence[Sequence[str]], seconds: float) -> int:
    """Run modules side by side; when a signal comes or one ends, end them all. Returns the worst code.

    Killed, it cannot end them: then they end themselves (see parent.py).

    Args:
        modules: each a module's name and its arguments.
        seconds: what is still there so long after it was asked to end is killed.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    # In sessions of their own: Ctrl-C reaches this process alone, which passes it on in good order.
    child = [sys.executable, "-m", "worker.parent", str(seconds)]
    processes = [
        await asyncio.create_subprocess_exec(
            *child, *module, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        for module in modules
    ]
    waits = [asyncio.ensure_future(process.wait()) for process in processes]
    signalled = asyncio.ensure_future(ended.wait())
    await asyncio.wait([signalled, *waits], return_when=asyncio.FIRST_COMPLETED)
    signalled.cancel()
    codes = [process.returncode for process in processes if process.returncode is not None]
    for process in processes:
        if process.returncode is None:
            process.terminate()
    _, late = await asyncio.wait(waits, timeout=seconds)
    for process in processes:
        if process.returncode is None:
            process.kill()
    if late:
        await asyncio.wait(waits)
    return max((abs(code) for code in codes), default=0)


Steps = Callable[[int, int], None]
"""Is told how many steps are done, of how many."""


def migrate(
    settings: Settings,
    sql: bool = False,  # noqa: FBT001, FBT002 - as the command line has it
    progress: Steps | None = None,
) -> int:
    """Bring tailrace's own tables up to date, and then those of the handlers' packages.

    A package named in HANDLERS may have an Alembic environment in `migrations/`, with its own version table.

    Args:
        settings: where the database is.
        sql: print the SQL instead of running it.
        progress: is told how many environments are done, of how many.
    """
    configure_logging(settings)
    if sql:
        import alembic.command  # noqa: PLC0415 - its import costs the other processes a quarter of a second

        alembic.command.upgrade(_config(OWN_MIGRATIONS), "head", sql=True)
        return 0
    try:
        return asyncio.run(_migrate(settings, progress))
    except DATABASE_ERRORS as error:
        raise ConfigurationError([f"{explain(error)}: nothing was migrated"]) from error


async def _migrate(settings: Settings, progress: Steps | None) -> int:
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace migrate", size=1)
    try:
        await upgrade(engine, settings, progress)
    finally:
        await engine.dispose()
    return 0


async def upgrade(engine: AsyncEngine, settings: Settings, progress: Steps | None = None) -> None:
    """Do what `migrate` does, over an engine that is open."""
    tell = progress or (lambda _done, _total: None)
    folders = handlers_migrations(settings.handlers)
    tell(0, 1 + len(folders))
    async with engine.begin() as connection:
        # Two releases at once: the second waits, and finds nothing left to do.
        await connection.execute(text("select pg_advisory_xact_lock(hashtext('tailrace.migrate'))"))
        await connection.execute(text("create schema if not exists tailrace"))
        await connection.run_sync(_run_alembic, OWN_MIGRATIONS)
        await _publish_canary(connection, settings.publication)
    tell(1, 1 + len(folders))
    for number, folder in enumerate(folders, 2):
        async with engine.begin() as connection:
            await connection.run_sync(_run_alembic, folder)
        tell(number, 1 + len(folders))


def handlers_migrations(modules: Sequence[str]) -> list[Path]:
    """Find the Alembic environments of the packages of handlers."""
    folders = []
    for name in modules:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue  # `listen` and `check` say so; migrating needs no handlers
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(location) / "migrations"
            if (folder / "env.py").is_file():
                folders.append(folder)
    return folders


async def _publish_canary(connection: AsyncConnection, publication: str) -> None:
    """Put the canary into the publication: it must come back by every path."""
    row = (
        await connection.execute(
            text(
                "select p.puballtables, exists (select from pg_publication_tables t"
                " where t.pubname = p.pubname and t.schemaname = 'tailrace' and t.tablename = 'canary')"
                " from pg_publication p where p.pubname = :name"
            ),
            {"name": publication},
        )
    ).one_or_none()
    quoted = '"' + publication.replace('"', '""') + '"'
    if row is None:
        await connection.execute(text(f"create publication {quoted} for table tailrace.canary"))
    elif not row[0] and not row[1]:
        await connection.execute(text(f"alter publication {quoted} add table tailrace.canary"))


def _config(folder: Path) -> "Config":
    from alembic.config import Config  # noqa: PLC0415 - as in migrate

    config = Config()
    config.set_main_option("script_location", str(folder))
    return config


def _run_alembic(connection: Connection, folder: Path) -> None:
    import alembic.command  # noqa: PLC0415 - as in migrate

    config = _config(folder)
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, "head")


__all__ = ["listen", "migrate", "run", "upgrade", "work"]
