"""What Postgres's catalogue says of the tables that handlers name: columns, keys, replica identity.

A picture of one moment, taken again when the tables have changed (see schema_watch.py). Changes are older or
newer than it, so decoding takes types from the payload and only asks here for what the payload cannot say.
Nothing here writes.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

Identity = Literal["default", "full", "index", "nothing"]
KEPT: Final = 4
"""Earlier pictures of a table that are kept."""


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """One column.

    Attributes:
        name: its name, unquoted.
        type: pg_type.typname, as in payloads: "int4", "_int4" for an array.
        sql_type: format_type() with its modifiers, for people: "character(5)".
        typmod: pg_attribute.atttypmod; -1 for none.
        not_null: declared NOT NULL.
        generated: GENERATED ALWAYS AS (…), which a write must not name.
        value: the type that values have on the wire: the base type of a domain, "text" for an enum,
            "_text" for an array of enums; empty where that is `type` itself.
        cast: name of the type for a cast, quoted and with its schema, whatever the search path.
        type_oid: pg_type.oid of the type; 0 where nobody asked.
    """

    name: str
    type: str
    sql_type: str
    typmod: int = -1
    not_null: bool = False
    generated: bool = False
    value: str = ""
    cast: str = ""
    type_oid: int = 0

    @property
    def value_type(self) -> str:
        """The type name by which values are decoded (see `value`)."""
        return self.value or self.type

    @property
    def sql_cast(self) -> str:
        """The type name for a cast in a statement."""
        return self.cast or self.sql_type


@dataclass(frozen=True, slots=True)
class Table:
    """One table, or partition.

    Attributes:
        schema: its schema, unquoted.
        name: its name, unquoted.
        oid: pg_class.oid.
        columns: by name, in table order; those that were dropped are not here.
        primary_key: column names in key order; empty without a primary key.
        identity: replica identity.
        identity_columns: columns that old records carry: the key's, all, the index's, none.
        row_security: row-level security is enabled.
        published: the publication covers it.
        earlier_keys: column names of the primary keys that it had before, as far as somebody wrote them down.
    """

    schema: str
    name: str
    oid: int
    columns: Mapping[str, ColumnInfo]
    primary_key: tuple[str, ...]
    identity: Identity
    identity_columns: frozenset[str]
    row_security: bool = False
    published: bool = True
    earlier_keys: tuple[tuple[str, ...], ...] = field(default=(), compare=False)

    @property
    def sql_name(self) -> str:
        """Quoted name with its schema, for a statement."""
        return f"{quote(self.schema)}.{quote(self.name)}"


@dataclass(slots=True)
class Catalogue:
    """The tables that exist of those asked for, by (schema, name), and whether the publication exists.

    `renew` takes another picture; what tables looked like before is kept for changes from before.
    """

    tables: Mapping[tuple[str, str], Table]
    publication_exists: bool
    version: int = field(default=0, compare=False)
    """Goes up when a renewal has found something changed."""
    _earlier: dict[tuple[str, str], tuple[Table, ...]] = field(default_factory=dict, compare=False)

    def renew(self, now: "Catalogue") -> bool:
        """Take what another look has found; returns whether anything is different."""
        if self == now:
            return False
        for name, table in self.tables.items():
            if now.tables.get(name) != table:
                self._earlier[name] = (table, *self._earlier.get(name, ()))[:KEPT]
        self.tables, self.publication_exists = now.tables, now.publication_exists
        self.version += 1
        return True

    def known(self, name: tuple[str, str]) -> tuple[Table, ...]:
        """Give what a table looks like and what it looked like before, newest first."""
        now = self.tables.get(name)
        earlier = self._earlier.get(name, ())
        return earlier if now is None else (now, *earlier)


def quote(identifier: str) -> str:
    """Quote an identifier for a statement."""
    return '"' + identifier.replace('"', '""') + '"'


_IDENTITIES: Final[dict[str, Identity]] = {"d": "default", "f": "full", "i": "index", "n": "nothing"}

_PUBLICATION: Final = text(
    "select exists (select from pg_catalog.pg_publication where pubname = :publication)"
)

# unnest of two arrays: one statement for any number of tables, without a list of parameters.
_TABLES: Final = text(
    """
    with published as (
        select schemaname, tablename from pg_catalog.pg_publication_tables where pubname = :publication
    ), wanted as (
        select w.nspname, w.relname
        from unnest(cast(:schemas as name[]), cast(:names as name[])) as w (nspname, relname)
        union
        select schemaname, tablename from published where :everything
    )
    select n.nspname, c.relname, c.oid, c.relreplident::text, c.relrowsecurity,
           exists (select from published p where p.schemaname = n.nspname and p.tablename = c.relname),
           array(select a.attname::text from pg_catalog.pg_index i,
                        unnest(i.indkey::int2[]) with ordinality as k (attnum, place)
                 join pg_catalog.pg_attribute a on a.attnum = k.attnum
                 where i.indrelid = c.oid and i.indisprimary and a.attrelid = c.oid
                   and k.place <= i.indnkeyatts
                 order by k.place),
           array(select a.attname::text from pg_catalog.pg_index i
                 join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey::int2[])
                 where i.indrelid = c.oid and i.indisreplident)
    from wanted w
    join pg_catalog.pg_namespace n on n.nspname = w.nspname
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.relname and c.relkind in ('r', 'p')
    order by 1, 2
    """
)

# A domain may rest on a domain, and an array on an array of domains: the recursion ends at types of their
# own.
_COLUMNS: Final = text(
    """
    select a.attrelid, a.attname, t.typname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.atttypmod,
           a.attnotnull, a.attgenerated <> '', coalesce(b.value, ''),
           pg_catalog.quote_ident(tn.nspname) || '.' || pg_catalog.quote_ident(t.typname),
           t.oid::int8
    from pg_catalog.pg_attribute a
    join pg_catalog.pg_type t on t.oid = a.atttypid
    join pg_catalog.pg_namespace tn on tn.oid = t.typnamespace
    left join lateral (
        with recursive base as (
            select t.oid, t.typtype, t.typname, t.typbasetype, t.typelem, t.typcategory, '' as prefix
            union all
            select u.oid, u.typtype, u.typname, u.typbasetype, u.typelem, u.typcategory,
                   case when base.typtype = 'd' then base.prefix else '_' end
            from base join pg_catalog.pg_type u
              on u.oid = case when base.typtype = 'd' then base.typbasetype
                              when base.typcategory = 'A' and base.prefix = '' then base.typelem end
        )
        select base.prefix || case base.typtype when 'e' then 'text' else base.typname::text end as value
        from base
        where base.typtype <> 'd' and not (base.typcategory = 'A' and base.prefix = '')
        limit 1
    ) b on true
    where a.attrelid = any (cast(:oids as oid[])) and a.attnum > 0 and not a.attisdropped
    order by a.attrelid, a.attnum
    """
)

# One number for all that a picture shows of the tables: to find out cheaply whether another one is due.
_SIGNATURE: Final = text(
    """
    select coalesce(sum(pg_catalog.hashtextextended(pg_catalog.concat_ws(' ',
        n.nspname, c.relname, c.oid, c.relreplident, c.relrowsecurity,
        (select string_agg(pg_catalog.concat_ws(' ', a.attnum, a.attname, a.atttypid, a.atttypmod,
                a.attnotnull, a.attgenerated, t.typname, t.typnamespace, t.typbasetype), ','
                order by a.attnum)
         from pg_catalog.pg_attribute a join pg_catalog.pg_type t on t.oid = a.atttypid
         where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
        (select string_agg(pg_catalog.concat_ws(' ', i.indkey, i.indnkeyatts, i.indisprimary,
                i.indisreplident), ',' order by i.indexrelid)
         from pg_catalog.pg_index i where i.indrelid = c.oid and (i.indisprimary or i.indisreplident))
    ), 0)::numeric), 0)::text
    from unnest(cast(:schemas as name[]), cast(:names as name[])) as w (nspname, relname)
    join pg_catalog.pg_namespace n on n.nspname = w.nspname
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.relname and c.relkind in ('r', 'p')
    """
)


async def read_signature(connection: AsyncConnection, tables: Iterable[tuple[str, str]]) -> str:
    """Give a text that is another one when any of the tables, which may not exist, was altered."""
    wanted = list(dict.fromkeys(tables))
    parameters = {"schemas": [schema for schema, _ in wanted], "names": [name for _, name in wanted]}
    return str((await connection.execute(_SIGNATURE, parameters)).scalar_one())


async def read_catalogue(
    connection: AsyncConnection, publication: str, tables: Iterable[tuple[str, str]] | None
) -> Catalogue:
    """Read the catalogue, in three statements whatever the number of tables.

    Args:
        connection: any connection; pg_catalog is readable by everybody.
        publication: name of the publication whose tables count as published.
        tables: (schema, name) of each table wanted, or None for all tables of the publication.

    Returns:
        The tables that exist. Views, foreign tables and the like are not tables here.
    """
    exists = bool((await connection.execute(_PUBLICATION, {"publication": publication})).scalar_one())
    wanted = list(dict.fromkeys(tables or ()))
    parameters = {
        "publication": publication,
        "schemas": [schema for schema, _ in wanted],
        "names": [name for _, name in wanted],
        "everything": tables is None,
    }
    rows = (await connection.execute(_TABLES, parameters)).all()
    found = await connection.execute(_COLUMNS, {"oids": [row[2] for row in rows]})
    columns: dict[int, dict[str, ColumnInfo]] = collections.defaultdict(dict)
    for oid, name, *rest in found:
        columns[oid][name] = ColumnInfo(name, *rest)
    return Catalogue({(row[0], row[1]): _table(row, columns[row[2]]) for row in rows}, exists)


def _table(row: Sequence[Any], columns: Mapping[str, ColumnInfo]) -> Table:
    schema, name, oid, identity_code, row_security, published, key, index = row
    identity = _IDENTITIES[identity_code]
    carried = {"default": key, "full": columns, "index": index, "nothing": ()}[identity]
    return Table(
        schema=schema,
        name=name,
        oid=oid,
        columns=dict(columns),
        primary_key=tuple(key),
        identity=identity,
        identity_columns=frozenset(carried),
        row_security=row_security,
        published=published,
    )
