"""What the database says now about tables: names, columns, keys, privileges, publications.

Read anew in each poll, because the real server judges a change by the catalog at the time of the
poll and not by that of the commit: a table renamed or a column dropped in between loses the change.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import asyncpg


class Column(NamedTuple):
    """One column of a table.

    `cast_name` is the type's name without a modifier, for casts; `readers` are the roles, of
    those asked for, that may select it.
    """

    name: str
    type_oid: int
    type_name: str
    cast_name: str
    in_key: bool
    readers: frozenset[str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as it is now; `columns` in table order."""

    oid: int
    schema: str
    name: str
    row_security: bool
    columns: tuple[Column, ...]

    @property
    def key(self) -> tuple[Column, ...]:
        """The columns of the primary key."""
        return tuple(column for column in self.columns if column.in_key)

    def column(self, name: str) -> Column | None:
        """Return the column called `name`, if there is one."""
        return next((column for column in self.columns if column.name == name), None)

    def readable(self, role: str) -> frozenset[str]:
        """Return the names of the columns that `role` may select."""
        return frozenset(column.name for column in self.columns if role in column.readers)


_RACES = 5

_TABLES = """
select c.oid, n.nspname, c.relname, c.relrowsecurity, a.attname, a.atttypid, t.typname,
       format_type(a.atttypid, null) as cast_name,
       coalesce(a.attnum = any (k.indkey), false) as in_key,
       array(
         select r.rolname from pg_roles r
         where r.rolname = any ($2::name[]) and has_column_privilege(r.oid, c.oid, a.attnum, 'SELECT')
       ) as readers
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_type t on t.oid = a.atttypid
left join pg_index k on k.indrelid = c.oid and k.indisprimary
where c.oid = any ($1::oid[])
order by c.oid, a.attnum
"""

_PUBLISHED = """
select c.oid, p.schemaname, p.tablename
from pg_publication_tables p
join pg_namespace n on n.nspname = p.schemaname
join pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
where p.pubname = $1
  and ($2::text is null or p.schemaname like $2)
  and ($3::text is null or p.tablename like $3)
order by c.oid
"""


class Catalog:
    """Reads tables and keeps those that did not change, so that what is derived from them is kept too."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[tuple[object, ...], Table]] = {}

    async def read(
        self, connection: asyncpg.Connection, oids: Iterable[int], roles: Iterable[str]
    ) -> dict[int, Table]:
        """Return the tables that exist; one that has not changed since the last time is the same object."""
        rows: dict[int, list[asyncpg.Record]] = {}
        for row in await connection.fetch(_TABLES, list(oids), list(roles)):
            rows.setdefault(row["oid"], []).append(row)
        return {oid: self._kept(oid, records) for oid, records in rows.items()}

    def _kept(self, oid: int, rows: Sequence[asyncpg.Record]) -> Table:
        signature = tuple(
            (*(value for name, value in row.items() if name != "readers"), frozenset(row["readers"]))
            for row in rows
        )
        known = self._tables.get(oid)
        if known is not None and known[0] == signature:
            return known[1]
        first = rows[0]
        table = Table(
            oid=oid,
            schema=first["nspname"],
            name=first["relname"],
            row_security=first["relrowsecurity"],
            columns=tuple(
                Column(
                    row["attname"],
                    row["atttypid"],
                    row["typname"],
                    row["cast_name"],
                    row["in_key"],
                    frozenset(row["readers"]),
                )
                for row in rows
            ),
        )
        self._tables[oid] = (signature, table)
        return table


async def published(
    connection: asyncpg.Connection, publication: str, schema: str | None = None, table: str | None = None
) -> frozenset[int]:
    """Return the oids of the publication's tables whose names match the LIKE patterns (None: all).

    No escape character is offered, as in the real server: `_` and `%` in a name are wildcards.
    """
    for races_left in reversed(range(_RACES)):
        try:
            rows = await connection.fetch(_PUBLISHED, publication, schema, table)
        except asyncpg.InternalServerError:
            # A table dropped while the view looks at it makes it fail; the next look is without it.
            if not races_left:
                raise
        else:
            return frozenset(row["oid"] for row in rows)
    return frozenset()
