"""Examines the handlers against the live schema, and the publication that names their tables."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from config.settings import Settings
from worker.catalogue import Catalogue, quote
from worker.check.findings import Finding, by_sql, listed
from worker.loader import Delivery, validate
from worker.registry import Handler

CANARY: Final = ("tailrace", "canary")

_RELATIONS = text(
    """
    select n.nspname as schema, c.relname as name, c.relkind::text as kind, c.relpersistence::text as kept,
           (select string_agg(pg_catalog.quote_ident(a.attname), ', ' order by k.place)
            from (select i.indkey::int2[] as columns, i.indnkeyatts from pg_catalog.pg_index i
                  where i.indrelid = c.oid and i.indisunique and i.indisvalid
                    and i.indpred is null and i.indexprs is null
                    and not exists (select from unnest(i.indkey::int2[]) u
                      join pg_catalog.pg_attribute n on n.attrelid = c.oid and n.attnum = u
                      where not n.attnotnull)
                  order by i.indnkeyatts, i.indexrelid limit 1) best,
                 unnest(best.columns) with ordinality as k (attnum, place)
            join pg_catalog.pg_attribute a on a.attnum = k.attnum
            where a.attrelid = c.oid and k.place <= best.indnkeyatts) as unique_columns
    from unnest(cast(:schemas as name[]), cast(:names as name[])) as w (nspname, relname)
    join pg_catalog.pg_namespace n on n.nspname = w.nspname
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.relname
    """
)
_PUBLICATION = text(
    """
    select p.pubinsert and p.pubupdate and p.pubdelete as complete, p.pubtruncate as truncates,
           p.pubviaroot as via_root
    from pg_catalog.pg_publication p where p.pubname = :publication
    """
)
# Filters and lists of columns are known from PostgreSQL 15 on: as one document, they are missing before.
_CUT = text(
    """
    select n.nspname as schema, c.relname as name,
           pg_catalog.to_jsonb(r) ->> 'prqual' is not null as rows,
           pg_catalog.to_jsonb(r) ->> 'prattrs' is not null as columns
    from pg_catalog.pg_publication p
    join pg_catalog.pg_publication_rel r on r.prpubid = p.oid
    join pg_catalog.pg_class c on c.oid = r.prrelid
    join pg_catalog.pg_namespace n on n.oid = c.relnamespace
    where p.pubname = :publication
      and (pg_catalog.to_jsonb(r) ->> 'prqual' is not null
        or pg_catalog.to_jsonb(r) ->> 'prattrs' is not null)
    order by 1, 2
    """
)
# What nobody can find by its old row, Postgres refuses to update: whoever writes to it gets an error.
_UNIDENTIFIED = text(
    """
    select pg_catalog.quote_ident(t.schemaname) || '.' || pg_catalog.quote_ident(t.tablename) as sql_name,
           t.schemaname as schema, t.tablename as name
    from pg_catalog.pg_publication p
    join pg_catalog.pg_publication_tables t on t.pubname = p.pubname
    join pg_catalog.pg_namespace n on n.nspname = t.schemaname
    join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = t.tablename
    where p.pubname = :publication and (p.pubupdate or p.pubdelete)
      and (c.relreplident = 'n'
        or c.relreplident = 'd' and not exists (select from pg_catalog.pg_index i
          where i.indrelid = c.oid and i.indisprimary and i.indimmediate)
        or c.relreplident = 'i' and not exists (select from pg_catalog.pg_index i
          where i.indrelid = c.oid and i.indisreplident))
    order by 1
    """
)
_KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table", "S": "a sequence"}


async def examine_tables(
    connection: AsyncConnection,
    settings: Settings,
    handlers: Sequence[Handler],
    catalogue: Catalogue,
    delivery: Delivery,
) -> list[Finding]:
    """Judge the handlers against the tables, as the listener does at its start, and say more of some."""
    relations = await _relations(connection, handlers)
    problems = validate(handlers, catalogue, delivery, publication=settings.publication)
    findings = [_finding(problem, relations) for problem in problems]
    findings += _never_told(relations)
    if not findings:
        findings += _old_records(handlers, catalogue)
    subscribed = [table for name, table in catalogue.tables.items() if name != CANARY]
    if not findings and subscribed:
        names = ", ".join(f"{table.schema}.{table.name}" for table in subscribed)
        findings.append(Finding("tables", "ok", f"{names}: published and fit for their handlers"))
    return findings


async def _relations(
    connection: AsyncConnection, handlers: Sequence[Handler]
) -> Mapping[tuple[str, str], Any]:
    wanted = sorted({(one.schema, one.table) for handler in handlers for one in handler.subscriptions})
    parameters = {"schemas": [schema for schema, _ in wanted], "names": [name for _, name in wanted]}
    found = await connection.execute(_RELATIONS, parameters)
    return {(row.schema, row.name): row for row in found}


def _finding(problem: str, relations: Mapping[tuple[str, str], Any]) -> Finding:
    """Part a loader's line into what is wrong and what to run."""
    name = "publication" if problem.startswith("publication ") else "tables"
    for (schema, table), row in relations.items():
        qualified = f"{schema}.{table}"
        if f"there is no table {qualified}" in problem and row.kind in _KINDS:
            detail = problem.partition("; ")[0]
            remedy = f"{qualified} is {_KINDS[row.kind]}, which has no changes: follow the tables behind it"
            return Finding(name, "problem", detail, remedy)
        if f"{qualified} is not in publication" in problem and row.kind == "p":
            detail = f"{problem.partition('; ')[0]}: it is partitioned, and changes come as its partitions'"
            remedy = "name the partitions in the handler, one decorator for each, and publish them"
            return Finding(name, "problem", detail, remedy)
        if f"{qualified} has no primary key" in problem:
            return Finding(name, "problem", problem.partition("; run: ")[0], _key(row))
    detail, found, remedy = problem.partition("; run: ")
    return by_sql(name, "problem", detail, remedy) if found else Finding(name, "problem", problem)


def _key(row: Any) -> str:  # noqa: ANN401 - a row
    table = f"{quote(row.schema)}.{quote(row.name)}"
    if row.unique_columns is not None:
        return (
            f"run: alter table {table} add primary key ({row.unique_columns}); (unique and not null already)"
        )
    return (
        f"run: alter table {table} add primary key (…); with the columns that identify a row, or:"
        f" alter table {table} add column id bigint generated always as identity primary key;"
        " (writes the whole table anew)"
    )


def _never_told(relations: Mapping[tuple[str, str], Any]) -> list[Finding]:
    """Find tables of which the log never has a change."""
    return [
        Finding(
            "tables",
            "problem",
            f"{schema}.{table} is unlogged: none of its changes is ever told",
            f"run: alter table {quote(schema)}.{quote(table)} set logged; (writes the whole table anew)",
        )
        for (schema, table), row in relations.items()
        if row.kept == "u"
    ]


def _old_records(handlers: Sequence[Handler], catalogue: Catalogue) -> list[Finding]:
    """Find handlers that look at old records of which nothing but the key is told."""
    findings = []
    for handler in handlers:
        for one in handler.subscriptions if handler.kind == "change" else ():
            table = catalogue.tables.get((one.schema, one.table))
            if table is None or not one.types & {"UPDATE", "DELETE"} or not _looks_back(handler):
                continue
            if table.columns.keys() - table.identity_columns:
                carried = listed(sorted(table.identity_columns)) or "nothing"
                detail = f"{handler.name} uses old_record, which has {carried} alone of {one.qualified}"
                statement = f"alter table {table.sql_name} replica identity full;"
                findings.append(by_sql("tables", "warning", detail, statement))
    return list(dict.fromkeys(findings))


def _looks_back(handler: Handler) -> bool:
    """Tell whether a handler's own code names the old record; what it calls is not looked into."""
    codes: list[Any] = [getattr(handler.function, "__code__", None)]
    while codes:
        code = codes.pop()
        if code is None:
            continue
        if {"old_record", "old_as"}.intersection(code.co_names):
            return True
        codes += [constant for constant in code.co_consts if hasattr(constant, "co_names")]
    return False


async def examine_publication(
    connection: AsyncConnection, settings: Settings, catalogue: Catalogue, delivery: Delivery
) -> list[Finding]:
    """Return what is to be said of the publication."""
    name = settings.publication
    quoted = quote(name)
    found = (await connection.execute(_PUBLICATION, {"publication": name})).one_or_none()
    if found is None:
        if len(catalogue.tables.keys() - {CANARY}) > 0:
            return []  # told with the tables that it should have
        return [by_sql("publication", "problem", f"{name} does not exist", f"create publication {quoted};")]
    findings = []
    canary = catalogue.tables.get(CANARY)
    if canary is not None and not canary.published:
        statement = f"alter publication {quoted} add table tailrace.canary;"
        detail = "tailrace.canary is not in the publication"
        findings.append(by_sql("publication", "problem", detail, statement))
    if not found.complete:
        kinds = "insert, update, delete, truncate"
        statement = f"alter publication {quoted} set (publish = '{kinds}');"
        detail = f"{name} does not publish inserts, updates and deletes alike"
        findings.append(by_sql("publication", "problem", detail, statement))
    findings += await _cut(connection, name, catalogue, delivery)
    findings += await _unidentified(connection, name, catalogue)
    if not findings:
        findings.append(Finding("publication", "ok", name))
    return findings


async def _cut(
    connection: AsyncConnection, publication: str, catalogue: Catalogue, delivery: Delivery
) -> list[Finding]:
    """Find tables of which the publication leaves something out. Realtime does not look at that."""
    findings = []
    for row in await connection.execute(_CUT, {"publication": publication}):
        table = catalogue.tables.get((row.schema, row.name))
        if table is None:
            continue
        parts = [word for word, cut in (("rows", row.rows), ("columns", row.columns)) if cut]
        detail = f"{publication} leaves out {' and '.join(parts)} of {row.schema}.{row.name}"
        remedy = (
            f"run: begin; alter publication {quote(publication)} drop table {table.sql_name};"
            f" alter publication {quote(publication)} add table {table.sql_name}; commit;"
        )
        state = "problem" if delivery == "proven" else "warning"
        findings.append(
            Finding("publication", "problem" if state == "problem" else "warning", detail, remedy)
        )
    return findings


async def _unidentified(connection: AsyncConnection, publication: str, catalogue: Catalogue) -> list[Finding]:
    rows = (await connection.execute(_UNIDENTIFIED, {"publication": publication})).all()
    # Of the handlers' own tables the missing key is told already.
    rows = [row for row in rows if not _keyless(catalogue, row)]
    if not rows:
        return []
    names = listed(f"{row.schema}.{row.name}" for row in rows)
    detail = f"UPDATE and DELETE of {names} fail for everybody: published, but without a replica identity"
    # Tables of others, perhaps: whether to give them a key or to take them out is not for a program to say.
    alters = " ".join(f"alter table {row.sql_name} replica identity full;" for row in rows)
    return [Finding("publication", "warning", detail, f"give them primary keys, or run: {alters}")]


def _keyless(catalogue: Catalogue, row: Any) -> bool:  # noqa: ANN401 - a row
    table = catalogue.tables.get((row.schema, row.name))
    return table is not None and not table.primary_key
