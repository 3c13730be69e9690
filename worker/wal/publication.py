"""The publication, by its object ids: dropped and made again under the same name, it is another one.

Commits in between are passed over, and from PostgreSQL 18 on nothing but a warning of the server says so.
Comparing two looks tells for which tables that may have happened.
"""

from collections.abc import Iterable
from typing import Final

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

_KEYS_KEPT: Final = 4
_READ: Final = text(
    """
    select p.oid as publication,
           p.pubinsert and p.pubupdate and p.pubdelete as complete, p.pubtruncate as truncates,
           p.pubviaroot as via_root,
           coalesce(pg_catalog.jsonb_agg(pg_catalog.jsonb_build_array(t.schemaname, t.tablename, c.oid::int8,
                    coalesce(r.oid::int8, 0), pg_catalog.jsonb_build_array(pg_catalog.to_jsonb(array(
                        select a.attname::text
                        from pg_catalog.pg_index i,
                             unnest(i.indkey::int2[]) with ordinality as k (attnum, place)
                        join pg_catalog.pg_attribute a on a.attnum = k.attnum
                        where i.indrelid = c.oid and i.indisprimary and a.attrelid = c.oid
                          and k.place <= i.indnkeyatts
                        order by k.place)))) order by t.schemaname, t.tablename)
                    filter (where c.oid is not null), '[]') as tables
    from pg_catalog.pg_publication p
    left join pg_catalog.pg_publication_tables t on t.pubname = p.pubname
    left join pg_catalog.pg_namespace n on n.nspname = t.schemaname
    left join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.tablename
    left join pg_catalog.pg_publication_rel r on r.prpubid = p.oid and r.prrelid = c.oid
    where p.pubname = :publication
    group by p.oid, p.pubinsert, p.pubupdate, p.pubdelete, p.pubtruncate, p.pubviaroot
    """
)


class PublishedTable(msgspec.Struct, frozen=True, array_like=True):
    """A table of the publication."""

    schema: str
    name: str
    oid: int
    membership: int
    """pg_publication_rel.oid; 0 where the publication covers all tables, a schema, or the table's root."""
    keys: tuple[tuple[str, ...], ...] = ()
    """Column names of the primary key, and of earlier ones as far as known, newest first."""


class Fingerprint(msgspec.Struct, frozen=True):
    """The publication at one moment. `msgspec.json` writes and reads it."""

    oid: int
    complete: bool
    """It publishes inserts, updates and deletes."""
    truncates: bool
    via_root: bool
    """Changes of partitions come as changes of their root."""
    tables: tuple[PublishedTable, ...]


async def read_fingerprint(connection: AsyncConnection, publication: str) -> Fingerprint | None:
    """Look at the publication; None if it does not exist."""
    row = (await connection.execute(_READ, {"publication": publication})).one_or_none()
    if row is None:
        return None
    document = msgspec.json.decode(row.tables) if isinstance(row.tables, str) else row.tables
    tables = msgspec.convert(document, tuple[PublishedTable, ...])
    return Fingerprint(row.publication, row.complete, row.truncates, row.via_root, tables)


def with_earlier_keys(before: Fingerprint | None, now: Fingerprint | None) -> Fingerprint | None:
    """Take over what an earlier look knew of primary keys: of changes from before nobody else can tell."""
    if before is None or now is None:
        return now
    known = {(table.schema, table.name): table.keys for table in before.tables}
    tables = []
    for table in now.tables:
        keys = tuple(dict.fromkeys([*table.keys, *known.get((table.schema, table.name), ())]))
        tables.append(msgspec.structs.replace(table, keys=keys[:_KEYS_KEPT]))
    return msgspec.structs.replace(now, tables=tuple(tables))


async def recorded_keys(connection: AsyncConnection) -> dict[tuple[str, str], tuple[tuple[str, ...], ...]]:
    """Read what was recorded of primary keys when the publication was last looked at."""
    found = (await connection.execute(text("select published from tailrace.source"))).scalar_one_or_none()
    if found is None:
        return {}
    document = msgspec.json.decode(found) if isinstance(found, str) else found
    recorded = msgspec.convert(document, Fingerprint)
    return {(table.schema, table.name): table.keys for table in recorded.tables}


def returned(
    before: Fingerprint | None, now: Fingerprint | None, wanted: Iterable[tuple[str, str]]
) -> tuple[tuple[str, str], ...]:
    """List the tables of those wanted that the publication has and had not at the look before."""
    had = set() if before is None else {(table.schema, table.name) for table in before.tables}
    has = set() if now is None else {(table.schema, table.name) for table in now.tables}
    return tuple(sorted((has - had).intersection(wanted)))


def interrupted(before: Fingerprint | None, now: Fingerprint | None) -> tuple[tuple[str, str], ...]:
    """List the tables whose changes may have been left out between two looks, as (schema, name), sorted.

    A table that is new in the publication is not among them: nobody could expect its changes before. One that
    was dropped and made anew is.
    """
    if before is None:
        return ()
    if now is None or before.oid != now.oid or (before.complete and not now.complete):
        return tuple(sorted((table.schema, table.name) for table in before.tables))
    still = {(table.schema, table.name): (table.oid, table.membership) for table in now.tables}
    return tuple(
        sorted(
            (table.schema, table.name)
            for table in before.tables
            if still.get((table.schema, table.name)) != (table.oid, table.membership)
        )
    )
