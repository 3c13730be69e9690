"""Process 2: the arq worker. `arq worker.jobs.WorkerSettings` starts it, `arq --check …` asks it.

arq hands out one job for each active lane and runs it here; order, uniqueness, retries and recovery are the
drain's. The settings are read when arq asks for `WorkerSettings`, not when this module is imported.
"""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack, suppress
from types import FrameType
from typing import Any

import structlog
import uvloop
from arq.worker import func
from redis.asyncio import Redis

from config.logging import configure_logging
from config.settings import Settings, load_settings
from config.supervisor import read_supervisor
from worker import telemetry
from worker.draining.workshop import Workshop
from worker.errors import ConfigurationError
from worker.lanes import Lane
from worker.processes import announce, cancel_until_done, settle_memory
from worker.queue import PatientRedis, arq_settings, decode_job, encode_job
from worker.search_path import search_here_first
from worker.supervision import attend
from worker.web import health_app, metrics_route, serve

log = structlog.get_logger(__name__)

MOST_JOBS = 1_000
"""How many lanes are drained at once is not decided by arq: see AT_ONCE in draining/workshop.py."""
JOB_SECONDS = 10
"""A job takes a moment; that of a killed worker stands in the queue for so long and ten seconds more."""
LAST_RESORT_SECONDS = 3.0


class WorkerProcess:
    """What runs beside arq in its process, from start-up to the end of the drain."""

    def __init__(self, settings: Settings, pool: PatientRedis) -> None:
        self._settings = settings
        self._pool = pool
        self._workshop: Workshop | None = None
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._main: asyncio.Task[Any] | None = None
        self._code = 0
        self._waits = ""

    def attend(self) -> None:
        """Begin to answer for the process, before all else: it may have to wait for Redis and Postgres."""
        configure_logging(self._settings)
        self._own(attend(read_supervisor(), self), "worker: supervision")
        if self._settings.health_port is not None:
            self._own(self._serve_health(self._settings.health_port), "worker: health")

    def _own(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._tasks.add(task)

    async def start(self, ctx: dict[str, Any]) -> None:
        """Open what the drain needs; waits for Postgres. arq calls this before it takes jobs."""
        configure_logging(self._settings)
        self._main = asyncio.current_task()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        try:
            opening = Workshop.open(self._settings, self._enqueue, self._wait)
            workshop = await self._stack.enter_async_context(opening)
        except ConfigurationError as error:
            _refuse(error)
        self._workshop = ctx["workshop"] = workshop
        self._pool.rung = workshop.draining.queued
        for work, name in workshop.tasks():
            self._own(work, name)
        settle_memory()
        log.info("working", worker=workshop.draining.name, handlers=len(workshop.handlers))

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Stop the process, loudly, when one of its own tasks has died."""
        self._tasks.discard(task)
        if task.cancelled() or self._pool.stopping:
            return
        error = task.exception()
        if error is None and task.get_name() == "worker: supervision":
            return  # nobody wants to hear it
        if isinstance(error, ConfigurationError):
            _tell(error)
            self._code = error.exit_code
        else:
            log.critical("a task of the worker ended", task=task.get_name(), exc_info=error)
            self._code = 1
        self._stop(signal.SIGTERM)

    def _stop(self, number: signal.Signals) -> None:
        if self._pool.stopping:
            return
        self._pool.stopping = True
        log.info("stopping", signal=number.name)
        if self._main is None:
            os._exit(self._code)  # nothing has been started yet: see _leave
        loop = asyncio.get_running_loop()
        loop.call_later(self._settings.drain_seconds + LAST_RESORT_SECONDS, self._give_up_waiting)
        self._stopper = loop.create_task(self._drain(), name="worker: drain")

    async def _drain(self) -> None:
        try:
            if self._workshop is not None:
                await self._workshop.draining.stop(self._settings.drain_seconds)
        finally:
            if self._main is not None:
                cancel_until_done(self._main)

    def _give_up_waiting(self) -> None:
        """End the process although something does not: what is in flight is rolled back, nothing is lost."""
        log.warning("the drain took too long", seconds=self._settings.drain_seconds)
        os._exit(self._code)

    async def end(self, ctx: dict[str, Any]) -> None:
        """Close everything. arq calls this last."""
        del ctx
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()
        log.info("stopped")
        if self._code:
            sys.exit(self._code)

    async def drain(self, ctx: dict[str, Any], handler: str, number: int) -> None:
        """Begin to drain a lane: the arq job."""
        workshop: Workshop = ctx["workshop"]
        workshop.draining.begin(Lane(handler, number))

    # Health

    def _wait(self, reason: str) -> None:
        self._waits = reason

    async def _serve_health(self, port: int) -> None:
        app = health_app(self, [metrics_route(self.samples)])
        async with serve(app, self._settings.health_host, port, setting="WORKER_HEALTH_PORT") as served:
            log.info("health of the worker", url=served.url)
            await asyncio.Event().wait()

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether the worker gets on; whoever waits for Redis or Postgres does."""
        return self._workshop.live() if self._workshop else (True, [])

    def _not_yet(self) -> str:
        """Tell why there is no workshop yet."""
        return self._pool.waits or self._waits or "starting"

    def doing(self) -> str:
        """Tell in a few words what the worker does; nothing while it is still starting."""
        if self._workshop is not None:
            return self._workshop.draining.doing()
        waits = self._pool.waits or self._waits
        return f"waiting: {waits}" if waits else ""

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell whether the worker can do its work."""
        return await self._workshop.ready() if self._workshop else (False, [self._not_yet()])

    async def serves(self) -> tuple[bool, list[str]]:
        """Tell the same: a worker stands by for nobody."""
        return await self.ready()

    def notes(self) -> list[str]:
        """Tell what else there is to know."""
        return self._workshop.notes() if self._workshop else []

    async def status(self) -> dict[str, Any]:
        """Tell what this worker has done."""
        if self._workshop is None:
            return {"ready": False, "reasons": [self._not_yet()], "handlers": []}
        return await self._workshop.status()

    async def samples(self) -> list[telemetry.Sample]:
        """Tell it in numbers."""
        if self._workshop is None:
            return telemetry.of_worker(ready=False, meters=telemetry.Meters(()), lanes={})
        return await self._workshop.samples()

    async def _enqueue(self, lane: Lane) -> None:
        await announce(self._pool, self._settings.queue, lane)


def _tell(error: ConfigurationError) -> None:
    for problem in error.problems:
        print(f"tailrace: {problem}", file=sys.stderr)  # noqa: T201 - the log may not be set up yet


def _refuse(error: ConfigurationError) -> None:
    _tell(error)
    raise SystemExit(error.exit_code)


def _leave(number: int, _frame: FrameType | None) -> None:
    """End at once: nothing has been started yet.

    An exception would not do: arq's way out asks Redis for something, and Redis may be what we wait for.
    """
    log.info("stopping", signal=signal.Signals(number).name)
    os._exit(0)


def worker_settings() -> type:
    """Make what arq reads its configuration from.

    Raises:
        SystemExit: with 2 and a line for each problem, where the settings are wrong.
    """
    try:
        search_here_first()
        settings = load_settings()
    except ConfigurationError as error:
        _refuse(error)
        raise
    configure_logging(settings)  # before arq's first lines: Redis may be away, and that is said in our words
    url = settings.redis_url.get_secret_value()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    pool = PatientRedis(url, queue=settings.queue)
    process = WorkerProcess(settings, pool)
    # As soon as the loop turns, if ever: `arq --check` has one of its own.
    loop.call_soon(process.attend)
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError):  # not in the main thread: whoever imports this there owns the signals
            signal.signal(number, _leave)
    attributes: dict[str, Any] = {
        "functions": [func(process.drain, name="drain", keep_result=0, max_tries=1_000_000)],
        "queue_name": settings.queue,
        "redis_settings": arq_settings(url),
        "redis_pool": pool,
        "job_serializer": encode_job,
        "job_deserializer": decode_job,
        "on_startup": process.start,
        "on_shutdown": process.end,
        "handle_signals": False,
        "max_jobs": MOST_JOBS,
        "queue_read_limit": MOST_JOBS,
        "job_timeout": JOB_SECONDS,
        "keep_result": 0,
        "log_results": False,
        "poll_delay": 0.005,
        "health_check_interval": 5,
        # Of this machine: what asks wants to know whether to restart the worker here.
        "health_check_key": f"{settings.queue}:health-check:{socket.gethostname()}",
    }
    return type("WorkerSettings", (), attributes)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - as PEP 562 has it
    if name == "WorkerSettings":
        return worker_settings()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Redis", "WorkerProcess", "worker_settings"]
