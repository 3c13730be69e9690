"""Examines the database: reachable, migrated, with room for us, and fit for the handlers."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import asyncpg
from alembic.script import ScriptDirectory
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from config.settings import Settings
from worker.catalogue import read_catalogue
from worker.check.access import examine_grants, examine_roles, examine_row_security
from worker.check.delivery import chosen
from worker.check.environments import FIX, examine_environment
from worker.check.findings import Finding
from worker.check.tables import CANARY, examine_publication, examine_tables
from worker.connecting import TRANSACTION_POOLER_PORT, connection_of
from worker.database import explain, make_engine
from worker.errors import ConfigurationError
from worker.loader import Delivery
from worker.pooling import Pooling, pooling_of
from worker.registry import Handler

CONNECTIONS = 16
"""What a listener (6) and a worker (10) take at most."""

_MIGRATIONS = Path(__file__).parents[2] / "migrations"
_MIGRATE = "run: python -m worker migrate"
_AWAY = (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)

_SERVER = text(
    "select current_setting('server_version') as version, current_user as role,"
    " current_setting('wal_level') as wal_level, to_regrole('service_role') is not null as has_service_role,"
    " current_setting('max_connections')::int"
    "  - current_setting('superuser_reserved_connections')::int as most,"
    " (select count(*) from pg_catalog.pg_stat_activity where backend_type = 'client backend')::int as used,"
    " (select count(*) from pg_catalog.pg_stat_activity"
    "   where application_name like 'tailrace%' and usename = current_user"
    "   and application_name <> 'tailrace check')::int as ours"
)
_REVISION = text("select version_num from tailrace.migration")


async def examine_database(
    settings: Settings, handlers: Sequence[Handler], environments: Sequence[Path]
) -> list[Finding]:
    """Return what is to be said of the database and of the handlers' tables in it.

    Args:
        settings: where it is.
        handlers: as loaded.
        environments: folders of the handlers' own Alembic environments.
    """
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace check", size=1)
    try:
        async with engine.connect() as connection:
            findings = await _examine_server(connection)
            findings.append(await _examine_migrations(connection))
            findings += [await examine_environment(connection, folder) for folder in environments]
            wanted = sorted(
                {(one.schema, one.table) for handler in handlers for one in handler.subscriptions}
            )
            catalogue = await read_catalogue(connection, settings.publication, [*wanted, CANARY])
            delivery = await _delivery(settings, connection)
            findings += await examine_tables(connection, settings, handlers, catalogue, delivery)
            findings += await examine_publication(connection, settings, catalogue, delivery)
            findings += await examine_grants(connection, catalogue)
            findings += await examine_roles(connection, handlers)
            findings += await examine_row_security(connection, catalogue, handlers, delivery)
            return findings
    except _AWAY as error:
        return [Finding("database", "problem", explain(error), "check DATABASE_URL and that Postgres runs")]
    finally:
        await engine.dispose()


async def _delivery(settings: Settings, connection: AsyncConnection) -> Delivery:
    try:
        return (await chosen(settings, connection)).delivery
    except ConfigurationError:
        return "proven"  # it is wanted, and what is in the way is told elsewhere


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
    free = server.most - server.used
    if free < CONNECTIONS - server.ours:
        detail = (
            f"{server.used} of {server.most} connections are in use; a listener takes 6, a worker 10 at most"
        )
        remedy = "connect through a pooler, end other clients, lower WORKER_LANES, or raise max_connections"
        findings.append(Finding("database", "warning", detail, remedy))
    return findings


async def _examine_migrations(connection: AsyncConnection) -> Finding:
    script = ScriptDirectory(str(_MIGRATIONS))
    wanted = set(script.get_heads())
    present = await connection.scalar(text("select to_regclass('tailrace.migration') is not null"))
    fixes = (FIX,)
    if not present:
        return Finding("migrations", "problem", "Tailrace's tables are missing", _MIGRATE, fixes)
    applied = set((await connection.execute(_REVISION)).scalars())
    if applied == wanted:
        return Finding("migrations", "ok", f"current ({', '.join(sorted(applied))})")
    known = {revision.revision for revision in script.walk_revisions()}
    here, needed = ", ".join(sorted(applied)) or "none", ", ".join(sorted(wanted))
    detail = f"the database is at {here}, this version needs {needed}"
    if applied <= known:
        return Finding("migrations", "problem", detail, _MIGRATE, fixes)
    return Finding(
        "migrations", "problem", detail, "the database is newer: run the Tailrace that migrated it, or newer"
    )


async def examine_poolers(settings: Settings) -> list[Finding]:
    """Return what stands between us and Postgres, by either URL."""
    direct = settings.database_direct_url
    urls = {"DATABASE_URL": settings.database_url.get_secret_value()}
    if direct is not None:
        urls["DATABASE_DIRECT_URL"] = direct.get_secret_value()
    answers = await asyncio.gather(*(_way(name, url) for name, url in urls.items()))
    findings = [found for found, _ in answers]
    if direct is not None and len({server for _, server in answers if server is not None}) > 1:
        detail = "DATABASE_URL and DATABASE_DIRECT_URL lead to different databases"
        remedy = "correct one of them: handlers write to the first, and the log is read from the second"
        findings.append(Finding("pooler", "problem", detail, remedy))
    return findings


async def _way(name: str, url: str) -> tuple[Finding, str | None]:
    """Tell the pooler, and which database of which cluster answers."""

    async def connect() -> asyncpg.Connection:
        address, arguments = connection_of(url, "tailrace check")
        arguments.pop("prepared_statement_cache_size", None)  # SQLAlchemy's own
        plain = address.set(drivername="postgresql").render_as_string(hide_password=False)
        return await asyncpg.connect(plain, **arguments | {"statement_cache_size": 0})

    try:
        # What answers on this port says so of itself.
        known = connection_of(url, "tailrace check")[0].port == TRANSACTION_POOLER_PORT
        pooling = Pooling.TRANSACTION if known else await pooling_of(connect)
        connection = await connect()
        try:
            server = str(
                await connection.fetchval(
                    "select (pg_control_system()).system_identifier::text || current_database()"
                )
            )
        finally:
            await connection.close()
    except ConfigurationError as error:
        return Finding("pooler", "problem", error.problems[0]), None
    except _AWAY as error:
        state = "skipped" if name == "DATABASE_URL" else "problem"
        words = explain(error).replace("DATABASE_URL", name)
        return Finding("pooler", "skipped" if state == "skipped" else "problem", f"{name}: {words}"), None
    if name == "DATABASE_DIRECT_URL" and pooling is not Pooling.NONE:
        detail = f"DATABASE_DIRECT_URL leads to a {pooling.value}, through which no log is streamed"
        remedy = "give it the direct address (db.<project>.supabase.co:5432), or remove it"
        return Finding("pooler", "warning", detail, remedy), server
    what = "a direct connection" if pooling is Pooling.NONE else f"a {pooling.value}"
    return Finding("pooler", "ok", f"{name} is {what}"), server
