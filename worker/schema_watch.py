"""Keeps the catalogue of the handlers' tables up to date while people alter them.

Whoever meets a change of a schema that the catalogue does not show has it read again at once; whoever merely
looks now and then asks for the tables' signature, and reads only where that is another one. What follows from
a change of schema is not decided here.
"""

import asyncio
import time
from collections.abc import Iterable

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.catalogue import Catalogue, read_catalogue, read_signature
from worker.database import forget_statements, is_away, singly

log = structlog.get_logger(__name__)

LOOK_SECONDS = 5.0
DOUBT_SECONDS = 1.0
FORGET_SECONDS = 10.0


class SchemaWatch:
    """One process's watch over the tables of its handlers.

    Args:
        engine: to look by.
        catalogue: what is known; kept up to date in place.
        publication: its name.
        tables: (schema, table) of each subscription; they may be dropped, and made again.
    """

    def __init__(
        self, engine: AsyncEngine, catalogue: Catalogue, publication: str, tables: Iterable[tuple[str, str]]
    ) -> None:
        self._engine = engine
        self.catalogue = catalogue
        self._publication = publication
        self._tables = tuple(tables)
        self._signature: str | None = None
        self._lock = asyncio.Lock()
        self._looked = self._forgot = -FORGET_SECONDS

    async def look(self, connection: AsyncConnection | None = None) -> bool:
        """See whether a table was altered, and read the catalogue again if so; returns whether it differs.

        Args:
            connection: to look by, where the caller has one.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        if connection is None:
            async with singly(self._engine) as own:
                return await self.look(own)
        signature = await read_signature(connection, self._tables)
        if signature == self._signature:
            return False
        # Taken before the catalogue: what is altered in between is seen at the next look.
        differs = await self.read(connection)
        self._signature = signature
        return differs

    async def doubt(self, connection: AsyncConnection) -> None:
        """Look, because something has failed. Tables that handlers only write to may be altered, too."""
        now = time.monotonic()
        if now - self._looked < DOUBT_SECONDS:
            return  # passes with care come in rows, and each of them asks
        self._looked = now
        if not await self.look(connection) and now - self._forgot > FORGET_SECONDS:
            self._forgot = now
            forget_statements(self._engine)

    async def keep(self) -> None:
        """Look now and then, for ever."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except Exception as error:
                if not is_away(error):  # who needs the database finds that out, and tells
                    log.exception("the catalogue cannot be read", error_class=type(error).__name__)

    async def read(self, connection: AsyncConnection | None = None) -> bool:
        """Read the catalogue again; returns whether it differs.

        Args:
            connection: to read by, where the caller has one; what it can see is what counts.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        if connection is None:
            async with self._engine.connect() as own:
                return await self.read(own)
        async with self._lock:
            found = await read_catalogue(connection, self._publication, self._tables)
            differs = self.catalogue.renew(found)
        if differs:
            forget_statements(self._engine)
            log.info("tables were altered: the catalogue was read again", tables=len(self._tables))
        return differs
