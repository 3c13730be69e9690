"""Examines the database: reachable, migrated, with the handlers' tables published and granted."""

from collections.abc import Sequence
from pathlib import Path

import asyncpg
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from config.settings import Settings
from worker.catalogue import Catalogue, Table, quote, read_catalogue
from worker.check.findings import Finding
from worker.database import explain, make_engine
from worker.delivery import choose
from worker.loader import Delivery, validate
from worker.registry import Handler

_MIGRATIONS = Path(__file__).parents[2] / "migrations"
_CANARY = ("tailrace", "canary")
_MIGRATE = "run: python -m worker migrate"

_SERVER = text(
    "select current_setting('server_version') as version, current_user as role,"
    " current_setting('wal_level') as wal_level, to_regrole('service_role') is not null as has_service_role"
)
_REVISION = text("select version_num from tailrace.migration")
_ROLES = text(
    "select current_user::text union"
    " select rolname::text from pg_catalog.pg_roles where rolname = 'service_role'"
)
_GRANTED = text(
    "select has_table_privilege(cast(:role as name), cast(:table as oid), 'select')"
    " and has_schema_privilege(cast(:role as name), cast(:schema as text), 'usage')"
)


async def examine_database(settings: Settings, handlers: Sequence[Handler]) -> list[Finding]:
    """Return what is to be said of the database and of the handlers' tables in it."""
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace check", size=1)
    try:
        async with engine.connect() as connection:
            findings = await _examine_server(connection)
            findings.append(await _examine_migrations(connection))
            tables = {(one.schema, one.table) for handler in handlers for one in handler.subscriptions}
            catalogue = await read_catalogue(connection, settings.publication, [*sorted(tables), _CANARY])
            findings += _examine_tables(settings, handlers, catalogue)
            findings += await _examine_grants(connection, catalogue)
            return findings
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        return [Finding("database", "problem", explain(error), "check DATABASE_URL and that Postgres runs")]
    finally:
        await engine.dispose()


async def _examine_server(connection: AsyncConnection) -> list[Finding]:
    server = (await connection.execute(_SERVER)).one()
    findings = [Finding("database", "ok", f"PostgreSQL {server.version} as {server.role}")]
    if server.wal_level != "logical":
        remedy = "run: alter system set wal_level = logical; and restart Postgres (hosted projects have it)"
        findings.append(
            Finding("database", "problem", f"wal_level is {server.wal_level}; Realtime needs logical", remedy)
        )
    if not server.has_service_role:
        remedy = "on a self-hosted Postgres create the roles of Supabase"
        findings.append(Finding("grants", "warning", "there is no role service_role", remedy))
    return findings


async def _examine_migrations(connection: AsyncConnection) -> Finding:
    script = ScriptDirectory(str(_MIGRATIONS))
    wanted = set(script.get_heads())
    present = await connection.scalar(text("select to_regclass('tailrace.migration') is not null"))
    if not present:
        return Finding("migrations", "problem", "Tailrace's tables are missing", _MIGRATE)
    applied = set((await connection.execute(_REVISION)).scalars())
    if applied == wanted:
        return Finding("migrations", "ok", f"current ({', '.join(sorted(applied))})")
    known = {revision.revision for revision in script.walk_revisions()}
    here, needed = ", ".join(sorted(applied)) or "none", ", ".join(sorted(wanted))
    detail = f"the database is at {here}, this version needs {needed}"
    if applied <= known:
        return Finding("migrations", "problem", detail, _MIGRATE)
    return Finding(
        "migrations", "problem", detail, "the database is newer: run the Tailrace that migrated it, or newer"
    )


def _examine_tables(settings: Settings, handlers: Sequence[Handler], catalogue: Catalogue) -> list[Finding]:
    """Judge the handlers against the tables, as the listener does at its start."""
    delivery: Delivery = choose(settings.delivery).delivery
    problems = validate(handlers, catalogue, delivery, publication=settings.publication)
    findings = [_finding(problem) for problem in problems]
    subscribed = [table for name, table in catalogue.tables.items() if name != _CANARY]
    if not problems and subscribed:
        names = ", ".join(f"{table.schema}.{table.name}" for table in subscribed)
        findings.append(Finding("tables", "ok", f"{names}: published and fit for their handlers"))
    canary = catalogue.tables.get(_CANARY)
    if canary is not None and catalogue.publication_exists and not canary.published:
        remedy = f'run: alter publication "{settings.publication}" add table tailrace.canary;'
        findings.append(
            Finding("publication", "problem", "tailrace.canary is not in the publication", remedy)
        )
    elif catalogue.publication_exists:
        findings.append(Finding("publication", "ok", settings.publication))
    elif not problems:
        remedy = f'run: create publication "{settings.publication}";'
        findings.append(Finding("publication", "problem", f"{settings.publication} does not exist", remedy))
    return findings


async def _examine_grants(connection: AsyncConnection, catalogue: Catalogue) -> list[Finding]:
    """Find tables for which Realtime would answer `401: Unauthorized`, or that we cannot read ourselves."""
    findings = []
    roles = [str(role) for role in (await connection.execute(_ROLES)).scalars()]
    for table in catalogue.tables.values():
        for role in roles:
            if not await _may_read(connection, role, table):
                remedy = (
                    f"run: grant usage on schema {quote(table.schema)} to {quote(role)};"
                    f" grant select on {table.sql_name} to {quote(role)};"
                )
                detail = f"{role} may not select from {table.schema}.{table.name}"
                findings.append(Finding("grants", "problem", detail, remedy))
    if not findings and "service_role" in roles and catalogue.tables:
        findings.append(Finding("grants", "ok", "service_role may read the tables"))
    return findings


async def _may_read(connection: AsyncConnection, role: str, table: Table) -> bool:
    parameters = {"role": role, "table": table.oid, "schema": table.schema}
    return bool(await connection.scalar(_GRANTED, parameters))


def _finding(problem: str) -> Finding:
    """Part a loader's line into what is wrong and what to run."""
    name = "publication" if problem.startswith("publication ") else "tables"
    detail, found, remedy = problem.partition("; run: ")
    return Finding(name, "problem", detail, f"run: {remedy}" if found else "")
