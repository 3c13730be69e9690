"""Makes a test's writes in a transaction, and tells them as the write-ahead log would.

The log carries Postgres's own text of each value, so that is what is read back here: a test's changes are
decoded, typed and routed by the very code that does it in production.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy
from sqlalchemy import Connection, Row, text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.orm.attributes import set_committed_value

from worker import catalogue
from worker.change import Column, LogChange, LogValue, RawChange, encode_columns
from worker.testing.writes import Write

_BUILT_IN: Final = 16_384
"""Types below are Postgres's own, known by their names."""


@dataclass
class Rows:
    """Writes rows through one connection.

    Attributes:
        connection: in a transaction.
        catalogue: of the tables, as the listener has it; of others it is read when they are written to.
    """

    connection: AsyncConnection
    tables: dict[tuple[str, str], catalogue.Table]
    publication: str

    def __post_init__(self) -> None:
        self._reflected: dict[tuple[str, str], sqlalchemy.Table] = {}

    async def write(self, write: Write, lsn: int, ordinal: int) -> RawChange:
        """Make a write; returns the change that the log has of it.

        Raises:
            LookupError: there is no such table or no such row.
            sqlalchemy.exc.DBAPIError: Postgres refuses it.
        """
        table = await self._table(write)
        target = await self._target(write)
        old = None if write.type == "INSERT" else await self._row(table, self._key(write, table))
        key = await self._execute(write, table, target)
        new = None if write.type == "DELETE" else await self._row(table, key)
        if write.instance is not None and new is not None:
            await self._fill(write, table, key)
        return _logged(table, write.type, new, _carried(table, old), lsn, ordinal)

    async def _table(self, write: Write) -> catalogue.Table:
        name = (write.schema, write.table)
        if name not in self.tables:
            found = await catalogue.read_catalogue(self.connection, self.publication, [name])
            if name not in found.tables:
                raise LookupError(f"there is no table {write.schema}.{write.table}")
            self.tables[name] = found.tables[name]
        table = self.tables[name]
        if not table.primary_key:
            raise LookupError(f"{write.schema}.{write.table} has no primary key, and so no changes")
        return table

    async def _target(self, write: Write) -> sqlalchemy.Table:
        """Give the table to SQLAlchemy, with the types of the values."""
        if write.mapper is not None:
            mapped = write.mapper.local_table
            if isinstance(mapped, sqlalchemy.Table):
                return mapped
        name = (write.schema, write.table)
        if name not in self._reflected:

            def reflect(connection: Connection) -> sqlalchemy.Table:
                with warnings.catch_warnings():
                    # Of a type that SQLAlchemy does not know: then the driver takes the value as it is.
                    warnings.simplefilter("ignore", sqlalchemy.exc.SAWarning)
                    return sqlalchemy.Table(
                        write.table,
                        sqlalchemy.MetaData(),
                        schema=write.schema,
                        autoload_with=connection,
                        resolve_fks=False,
                    )

            self._reflected[name] = await self.connection.run_sync(reflect)
        found = self._reflected[name]
        if unknown := sorted(write.values.keys() - {column.name for column in found.c}):
            raise LookupError(f"{write.schema}.{write.table} has no column {', '.join(unknown)}")
        return found

    @staticmethod
    def _key(write: Write, table: catalogue.Table) -> tuple[Any, ...]:
        key = write.key if isinstance(write.key, tuple) else (write.key,)
        if len(key) != len(table.primary_key):
            columns = ", ".join(table.primary_key)
            raise LookupError(f"the primary key of {write.schema}.{write.table} is ({columns}), not {key}")
        return key

    async def _execute(
        self, write: Write, table: catalogue.Table, target: sqlalchemy.Table
    ) -> tuple[Any, ...]:
        """Run the statement; returns the key that the row has now."""
        columns = [_column(target, name) for name in table.primary_key]
        statement: Any
        if write.type == "INSERT":
            statement = sqlalchemy.insert(target).values(_values(target, write.values)).returning(*columns)
        else:
            key = self._key(write, table)
            where = [column == value for column, value in zip(columns, key, strict=True)]
            if write.type == "DELETE":
                statement = sqlalchemy.delete(target).where(*where).returning(*columns)
            elif write.values:
                changed = _values(target, write.values)
                statement = sqlalchemy.update(target).where(*where).values(changed).returning(*columns)
            else:
                raise ValueError(f"an update of {write.schema}.{write.table} that changes nothing")
        row: Row[Any] | None = (await self.connection.execute(statement)).one_or_none()
        if row is None:
            raise LookupError(f"no row of {write.schema}.{write.table} was written: a trigger forbade it")
        return tuple(row)

    async def _row(self, table: catalogue.Table, key: Sequence[Any]) -> list[LogValue]:
        """Read a row as text, by the output functions of its types, as the log has it."""
        outputs = ", ".join(
            # `is not null` would say no of a composite with a null in it.
            f"case when {name} is distinct from null then format('%s', {name}) end"
            for name in map(catalogue.quote, table.columns)
        )
        named = [(n, name, table.columns[name]) for n, name in enumerate(table.primary_key)]
        where = " and ".join(
            f"{catalogue.quote(name)} = cast(:k{n} as {one.sql_cast})" for n, name, one in named
        )
        statement = text(f"select {outputs} from {table.sql_name} where {where}")  # noqa: S608 - names are quoted
        found = (
            await self.connection.execute(statement, {f"k{n}": one for n, one in enumerate(key)})
        ).one_or_none()
        if found is None:
            shown = ", ".join(table.primary_key)
            raise LookupError(f"{table.schema}.{table.name} has no row with this primary key ({shown})")
        return [None if value is None else str(value).encode() for value in found]

    async def _fill(self, write: Write, table: catalogue.Table, key: Sequence[Any]) -> None:
        """Give an instance what its row has now."""
        mapper, instance = write.mapper, write.instance
        if mapper is None or instance is None:
            return
        attributes = list(mapper.column_attrs)
        columns = [_column(mapper.local_table, name) for name in table.primary_key]
        query = sqlalchemy.select(*(one.columns[0] for one in attributes)).where(
            *(column == value for column, value in zip(columns, key, strict=True))
        )
        row = (await self.connection.execute(query)).one()
        for attribute, value in zip(attributes, row, strict=True):
            set_committed_value(instance, attribute.key, value)


def _column(table: Any, name: str) -> Any:  # noqa: ANN401 - of SQLAlchemy, by its name in the database
    return next(column for column in table.c if column.name == name)


def _values(table: sqlalchemy.Table, values: Mapping[str, Any]) -> dict[Any, Any]:
    return {_column(table, name): value for name, value in values.items()}


def _carried(table: catalogue.Table, old: list[LogValue] | None) -> list[LogValue] | None:
    """Leave of an old row what the replica identity carries."""
    if old is None:
        return None
    return [
        value if name in table.identity_columns else False
        for name, value in zip(table.columns, old, strict=True)
    ]


def _logged(
    table: catalogue.Table,
    change_type: Any,  # noqa: ANN401 - as the write says it
    new: list[LogValue] | None,
    old: list[LogValue] | None,
    lsn: int,
    ordinal: int,
) -> RawChange:
    says_key = table.identity == "default"
    columns = [
        Column(
            one.name,
            one.type,
            one.type_oid if one.type_oid >= _BUILT_IN else 0,
            says_key and one.name in table.primary_key,
        )
        for one in table.columns.values()
    ]
    committed = time.time_ns() // 1000
    return RawChange.of_log(
        LogChange(
            table.schema,
            table.name,
            change_type,
            encode_columns(columns),
            new,
            old,
            committed,
            0,
            lsn,
            ordinal,
            table.oid,
        )
    )
