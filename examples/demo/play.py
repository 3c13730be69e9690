"""The order of things in the demo: what is started, when the shop opens, what is compared, what is ended.

How each part does its work is in the part's own module.
"""

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from examples.demo.comparison import compare
from examples.demo.database import GONE, Connection, connect, execute
from examples.demo.observation import Observation, Observer
from examples.demo.processes import Child, Children, DemoError
from examples.demo.shop import SOURCE, STOPWATCH, Shop
from examples.demo.view import Addresses, View
from standin.embedded.process import tail

_READY_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_STUCK_SECONDS = 60.0
_SETTLED_SECONDS = 3.0
_BLAME_SECONDS = 3.0
_PYTHON: Final = (sys.executable, "-m")
_ADDRESSES = ("supabase_url", "realtime_url", "database_url", "redis_url", "service_role_key", "jwt_secret")


@dataclass(frozen=True)
class Options:
    """What the person asked for.

    Attributes:
        seconds: how long the shop is open; None for ever.
        rate: changes a second.
        workers: how many worker processes.
        keep: folder for everything, which is then kept; None for a temporary one.
    """

    seconds: float | None = None
    rate: float = 250.0
    workers: int = 1
    keep: Path | None = None


class Demo:
    """One run of the demo."""

    def __init__(self, options: Options, view: View) -> None:
        self._options = options
        self._view = view
        self._folder = _folder(options.keep)
        self._children = Children(self._folder)
        self._shop: Shop | None = None

    async def play(self) -> int:
        """Play to the end; the exit code. However it ends, nothing is left running.

        Raises:
            DemoError: it could not be played to the end.
        """
        failed = True
        try:
            async with asyncio.TaskGroup() as group:
                code = await self._play(group)
            failed = code != 0
        except BaseExceptionGroup as errors:
            explained = _explained(errors)
            if isinstance(explained, GONE):
                explained = DemoError(self._gone("PostgreSQL", "postgres"))
            raise explained from errors
        except asyncio.CancelledError:
            failed = False
            raise
        finally:
            self._view.freeze()
            unclean = await self._children.end()
            for child in unclean:
                self._view.say(f"when asked to end, {child.explained()}", "yellow")
            self._clean(failed=failed or bool(unclean))
        return code

    @property
    def written(self) -> int:
        """Changes that the shop has committed."""
        return self._shop.changes if self._shop else 0

    # The parts of the play

    async def _play(self, group: asyncio.TaskGroup) -> int:
        view, watchers = self._view, list[asyncio.Task[None]]()

        def watch(child: Child) -> None:
            watchers.append(group.create_task(child.watch(), name=f"demo: watch the {child.name}"))

        view.say("starting PostgreSQL, Redis and a local Supabase Realtime")
        standin = await self._children.start(
            "stand-in", [*_PYTHON, "standin", "--redis", "--data", str(self._folder / "servers")]
        )
        watch(standin)
        told = await standin.said(lambda line: line if set(_ADDRESSES) <= line.keys() else None)
        settings, url = _settings(told), str(told["database_url"])
        watchers.append(group.create_task(self._watch_redis(settings["REDIS_URL"]), name="demo: watch Redis"))

        view.say(
            "making the tables: the shop's, then Tailrace's and the handlers' (python -m worker migrate)"
        )
        await execute(url, SOURCE)
        migration = await self._children.start("migration", [*_PYTHON, "worker", "migrate"], settings)
        await migration.succeed()
        await execute(url, STOPWATCH)

        view.say(
            "starting the listener (python -m worker listen) and the worker (arq worker.jobs.WorkerSettings)"
        )
        listener = await self._children.start("listener", [*_PYTHON, "worker", "listen"], settings)
        watch(listener)
        for number in range(1, self._options.workers + 1):
            name = "worker" if self._options.workers == 1 else f"worker {number}"
            command = [*_PYTHON, "arq", "worker.jobs.WorkerSettings"]
            watch(await self._children.start(name, command, settings))
        health = await listener.said(_health_url)

        db = await connect(url)
        try:
            addresses = Addresses(health, url)
            observer = Observer(health, db)
            await self._until_ready(observer)
            code = await self._trade(addresses, observer, db, group)
        except GONE:
            # A child that dies takes connections with it: the child is the cause, and its watcher says so.
            await asyncio.sleep(_BLAME_SECONDS)
            raise
        finally:
            with suppress(*GONE):
                await db.close(timeout=2)
        for watcher in watchers:
            watcher.cancel()
        return code

    async def _watch_redis(self, url: str) -> None:
        """Hold a connection to Redis until it goes away: nobody else would end for that."""
        parts = urlsplit(url)
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            try:
                await reader.read()
            finally:
                writer.close()
        except OSError:
            pass
        # It goes with the stand-in, too; then the stand-in is the cause, and its watcher says so.
        await asyncio.sleep(_BLAME_SECONDS)
        raise DemoError(self._gone("Redis", "redis"))

    def _gone(self, what: str, name: str) -> str:
        return f"{what} went away; its log ends: {tail(self._folder / 'servers' / name / f'{name}.log', 2)}"

    async def _until_ready(self, observer: Observer) -> None:
        """Wait for a subscription and for all workers: only then can every change be delivered."""
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            seen = await observer.look()
            workers = len(seen.status.get("workers", []))
            if seen.ready and workers >= self._options.workers:
                return
            if time.monotonic() > deadline:
                reasons = (
                    seen.reasons if not seen.ready else [f"{workers} of {self._options.workers} workers work"]
                )
                raise DemoError(f"not ready after {_READY_SECONDS:.0f} s: {'; '.join(reasons)}")
            # Readiness is asked for over HTTP, as a platform asks.
            await asyncio.sleep(0.1)

    async def _trade(
        self, addresses: Addresses, observer: Observer, db: Connection, group: asyncio.TaskGroup
    ) -> int:
        """Keep the shop open, then see whether everything was derived."""
        shop = self._shop = Shop(addresses.database, self._options.rate)
        self._view.open(addresses)
        trading = group.create_task(self._keep_open(shop), name="demo: shop")
        until = time.monotonic() + (self._options.seconds or float("inf"))
        while (left := until - time.monotonic()) > 0:
            self._view.show(await observer.look(), shop, addresses)
            await asyncio.sleep(min(_LOOK_SECONDS, left))
        shop.close()
        await trading
        last = await shop.last_order()
        seen, settled = await self._until_derived(last, addresses, observer, db)
        self._view.freeze()
        return await self._summarise(seen, db, settled=settled)

    async def _keep_open(self, shop: Shop) -> None:
        try:
            await shop.run()
        except* GONE:
            await asyncio.sleep(_BLAME_SECONDS)  # as in _play
            raise

    async def _until_derived(
        self, last: int, addresses: Addresses, observer: Observer, db: Connection
    ) -> tuple[Observation, bool]:
        """Wait until the last order has been through and nothing waits any more; False if that does not come.

        Changes come in the order of their commits: when the last one is there, none before it is on its way.
        """
        assert self._shop is not None  # noqa: S101 - the shop was open
        applied, moved_at = -1, time.monotonic()
        while True:
            arrived = await db.fetchval(
                "select exists (select from public.order_status_log where order_id = $1)", last
            )
            seen = await observer.look(all_lags=True)
            if arrived and seen.waiting == 0:
                return seen, True
            if seen.applied != applied:
                applied, moved_at = seen.applied, time.monotonic()
            if time.monotonic() - moved_at > _STUCK_SECONDS:
                return seen, False
            doing = f"the shop is closed; waiting until all is derived ({max(seen.waiting, 0):,} to go)"
            self._view.show(seen, self._shop, addresses, doing)
            await asyncio.sleep(0.1)

    async def _summarise(self, seen: Observation, db: Connection, *, settled: bool) -> int:
        assert self._shop is not None  # noqa: S101 - the shop was open
        shop, counts, say = self._shop, self._shop.counts, self._view.say
        compared = await compare(db)
        deadline = time.monotonic() + _SETTLED_SECONDS
        while any(one.wrong for one in compared) and time.monotonic() < deadline:
            # The counters may be ahead of the last commit by a moment.
            await asyncio.sleep(0.2)
            compared = await compare(db)
        say(
            f"written: {shop.changes:,} changes in {shop.seconds:.1f} s, {shop.changes / shop.seconds:.0f}/s:"
            f" {counts['inserts']:,} inserts, {counts['updates']:,} updates, {counts['deletes']:,} deletes"
            f" in {counts['transactions']:,} transactions"
        )
        say(f"lag: {seen.lag}, from the commit of a change to the commit of its derived row")
        say(f"gaps: {len(seen.status.get('gaps', [])) or 'none'}")
        if not settled:
            say(f"derived: NOT ALL after a minute without progress; {seen.waiting:,} still wait", "bold red")
        for one in compared:
            say(f"compared with what it should be: {one}", "bold red" if one.wrong else "green")
        return 0 if settled and not any(one.wrong for one in compared) else 1

    def _clean(self, *, failed: bool) -> None:
        if self._options.keep is not None:
            self._view.say(f"logs and data: {self._folder}")
        elif failed:
            servers = self._folder / "servers"
            for log in servers.glob("*/*.log"):
                log.rename(self._folder / log.name)
            shutil.rmtree(servers, ignore_errors=True)
            self._view.say(f"logs: {self._folder} (with --keep-data DIR the database is kept, too)")
        else:
            shutil.rmtree(self._folder, ignore_errors=True)


def _folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="tailrace-demo-"))
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if any(keep.iterdir()):
            raise DemoError(f"--keep-data {keep} is not empty: name a new folder")
    except OSError as error:
        raise DemoError(f"--keep-data {keep} cannot be used: {error.strerror}") from None
    return keep.absolute()


def _settings(told: Mapping[str, Any]) -> dict[str, str]:
    """Put together what listener and worker are told, as they would be told of a real project."""
    return {
        "SUPABASE_URL": str(told["supabase_url"]),
        "SUPABASE_SERVICE_ROLE_KEY": str(told["service_role_key"]),
        "SUPABASE_JWT_SECRET": str(told["jwt_secret"]),
        "DATABASE_URL": str(told["database_url"]),
        "REDIS_URL": str(told["redis_url"]),
        "HANDLERS": "handlers",
        "PORT": "0",
        "WORKER_DRAIN_SECONDS": "3",
        "WORKER_LOG_FORMAT": "json",
    }


def _health_url(line: Mapping[str, Any]) -> str | None:
    return str(line["url"]) if line.get("message") == "health of the listener" else None


def _explained(error: BaseException) -> BaseException:
    """Choose the error that explains most: that of a child, else whichever came first."""
    # A group of errors is known by its parts.
    parts: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    leaves = [_explained(part) for part in parts] or [error]
    return next((one for one in leaves if isinstance(one, DemoError)), leaves[0])
