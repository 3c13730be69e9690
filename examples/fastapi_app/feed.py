"""Derived changes as they are committed, for everybody who watches: one connection that listens, for all.

A notification may be lost with the connection. So nothing is made of it but a hint: whoever watches reads the
row itself, and reads it again after every reconnection.
"""

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncpg  # pyright: ignore[reportMissingTypeStubs] # there are none
import structlog

log = structlog.get_logger(__name__)

CHANNEL = "author_stats"
MOST_WAITING = 100


class Watcher:
    """Somebody who watches. Keys of what changed come out of `changed`; None means that anything may have."""

    def __init__(self) -> None:
        self._keys: dict[str | None, None] = {None: None}  # at first, look at everything
        self._rung = asyncio.Event()
        self._rung.set()

    def tell(self, key: str | None) -> None:
        """Say what changed. Somebody slow is told once of many changes of a key, or of all."""
        if len(self._keys) >= MOST_WAITING:
            self._keys, key = {}, None
        self._keys[key] = None
        self._rung.set()

    async def changed(self) -> list[str | None]:
        """Wait until there is something, and take it."""
        await self._rung.wait()
        self._rung.clear()
        keys, self._keys = list(self._keys), {}
        return keys


class Feed:
    """Listens.

    Args:
        url: of a direct connection or a session pooler: behind a transaction pooler nothing is heard.
    """

    def __init__(self, url: str) -> None:
        self._url = url.replace("postgresql+asyncpg://", "postgresql://")
        self._watchers: set[Watcher] = set()
        self.connected = False

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None]:
        """Listen while the context is open; reconnects for as long as it takes."""
        task = asyncio.create_task(self._listen(), name="feed")
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @asynccontextmanager
    async def watching(self) -> AsyncGenerator[Watcher]:
        """Give a watcher for a while."""
        watcher = Watcher()
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    async def _listen(self) -> None:
        while True:
            try:
                await self._until_lost()
            except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
                log.warning("nothing is heard of derived changes, trying on", cause=type(error).__name__)
            self.connected = False
            await asyncio.sleep(random.uniform(0.2, 2.0))  # noqa: S311 - jitter, not a secret

    async def _until_lost(self) -> None:
        lost = asyncio.Event()
        driver: Any = asyncpg
        connection: Any = await driver.connect(self._url, timeout=10, statement_cache_size=0)

        def ended(_: object) -> None:
            lost.set()

        def heard(_connection: object, _pid: int, _channel: str, key: str) -> None:
            self._tell(key)

        try:
            connection.add_termination_listener(ended)
            await connection.add_listener(CHANNEL, heard)
            self.connected = True
            self._tell(None)  # of what was said before, nothing was heard
            await lost.wait()
        finally:
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
                await connection.close(timeout=2)

    def _tell(self, key: str | None) -> None:
        for watcher in self._watchers:
            watcher.tell(key)
