"""What a reading does when its tables are altered: it reads the catalogue again, and tells people.

A change that lists other columns than the catalogue shows waits until the catalogue has been read again; what
alters no list of columns (a key, a replica identity) is found within one tick.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from worker import positions
from worker.catalogue import Catalogue
from worker.loader import validate
from worker.registry import Handler
from worker.schema_watch import SchemaWatch
from worker.source import Gap

log = structlog.get_logger(__name__)

VISIBLE_SECONDS = 10.0
LOOK_SECONDS = 0.02


class Schema:
    """The catalogue of a listener, kept up to date."""

    def __init__(
        self,
        engine: AsyncEngine,
        handlers: Sequence[Handler],
        catalogue: Catalogue,
        publication: str,
        record: Callable[[Gap], Awaitable[None]],
    ) -> None:
        self._engine = engine
        self._handlers = handlers
        self._catalogue = catalogue
        self._publication = publication
        self._record = record
        self._tables = {(one.schema, one.table) for handler in handlers for one in handler.subscriptions}
        self._watch = SchemaWatch(engine, catalogue, publication, sorted(self._tables))
        self._keys = {name: table.primary_key for name, table in catalogue.tables.items()}
        self._version = catalogue.version
        self._told = set(self._problems())

    async def look(self) -> None:
        """See whether a table was altered; tell what no longer fits.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        await self._watch.look()
        if self._version != self._catalogue.version:
            await self._follow()

    async def read_after(self, xid: int | None) -> None:
        """Read the catalogue again, once the transaction of a change can be seen: it may have altered it.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + VISIBLE_SECONDS
        while xid is not None and not await self._is_visible(xid) and loop.time() < until:  # noqa: ASYNC110 - Postgres sends no event
            await asyncio.sleep(LOOK_SECONDS)
        await self._watch.read()

    async def _is_visible(self, xid: int) -> bool:
        async with AsyncSession(self._engine) as session:
            return bool(await positions.visible(session, [xid]))

    async def _follow(self) -> None:
        """Draw the consequences of what was altered."""
        self._version = self._catalogue.version
        found = self._problems()
        for problem in found:
            if problem not in self._told:
                log.error("a handler does not fit the database any more", problem=problem)
        self._told = set(found)
        for name, table in self._catalogue.tables.items():
            before, self._keys[name] = self._keys.get(name, ()), table.primary_key
            # A key whose columns have other names now is the same key.
            another = before != table.primary_key and table.columns.keys() >= set(before)
            if before and another and self._has_derived_by_key(name):
                cause = f"the primary key of {'.'.join(name)} is another one, and handlers compute by it"
                await self._record(Gap(None, datetime.now(UTC), cause, (name,)))

    def _problems(self) -> list[str]:
        # Of the deliveries the one that asks for less: which one it is was judged at the start.
        return validate(self._handlers, self._catalogue, "proven", publication=self._publication)

    def _has_derived_by_key(self, name: tuple[str, str]) -> bool:
        return any(
            handler.kind == "derive" and one.lane_key is None and (one.schema, one.table) == name
            for handler in self._handlers
            for one in handler.subscriptions
        )
