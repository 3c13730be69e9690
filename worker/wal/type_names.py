"""Names of types by oid: the log describes columns by oid, changes by pg_type.typname.

Read from the catalogue, all at once, and again when an oid comes that it did not have. A type that is gone
from the catalogue keeps the name that the log itself gives; one that was renamed keeps its old one for a
while, which is no matter: what people have made is told apart by oid (see worker/schemas.py).
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from worker.wal.pgoutput import TypeName

_ALL: Final = text("select oid, typname from pg_catalog.pg_type")


class TypeNames:
    """What the catalogue, and failing that the log, calls the types."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._names: dict[int, str] = {}
        self.known: Mapping[int, str] = MappingProxyType(self._names)
        """Name by oid."""

    async def learn(self, oids: Iterable[int], said: Mapping[int, TypeName]) -> None:
        """Find out names that are not known yet; afterwards each of these oids has one.

        Args:
            oids: of the types.
            said: what the log said of types, by oid.

        Raises:
            sqlalchemy.exc.DBAPIError: the database is away.
        """
        if self._missing(oids):
            async with self._engine.connect() as connection:
                self._names.update({row.oid: row.typname for row in await connection.execute(_ALL)})
        for oid in self._missing(oids):
            # Nobody can read a type without a name: its values come as text.
            self._names[oid] = said[oid].name if oid in said else f"type {oid}"

    def _missing(self, oids: Iterable[int]) -> list[int]:
        return [oid for oid in oids if oid not in self._names]
