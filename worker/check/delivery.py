"""Examines the delivery: whether the database allows the one that is wanted, and how its log is read."""

import asyncpg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection

from config.settings import Settings
from worker.check.findings import Finding
from worker.check.slots import examine_slots
from worker.database import explain, make_engine
from worker.delivery import UNPROTECTED, Choice, choose
from worker.errors import ConfigurationError
from worker.wal.failures import WalError
from worker.wal.reader import choose_transport
from worker.wal.slot import judge, read_permission, read_server, read_slot


async def examine_delivery(settings: Settings) -> list[Finding]:
    """Return what is to be said of WORKER_DELIVERY, and of the replication slots."""
    if settings.delivery == "webhooks" and settings.hook_secret is None:
        return [Finding("delivery", "problem", UNPROTECTED)]
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace check", size=1)
    try:
        async with engine.connect() as connection:
            findings, proven = await _choice(settings, connection)
            findings += await examine_slots(connection, settings.slot, proven=proven)
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        return [Finding("delivery", "skipped", f"nobody knows what the database allows: {explain(error)}")]
    finally:
        await engine.dispose()
    if proven:
        findings[0] = await _transport(settings, findings[0])
    return findings


async def chosen(settings: Settings, connection: AsyncConnection) -> Choice:
    """Tell which delivery a listener would choose.

    Raises:
        ConfigurationError: what is wanted cannot be had.
    """
    if settings.delivery in ("plain", "webhooks"):
        return choose(settings.delivery)
    permission = await read_permission(connection, settings.slot)
    slot = await read_slot(connection, settings.slot)
    judgement = judge(slot, await read_server(connection), None)
    foreign = judgement.reason if judgement.finding == "foreign" else ""
    choice = choose(settings.delivery, allowed=permission.allowed, why_not=permission.reason, taken=foreign)
    if foreign and choice.delivery == "proven":
        raise ConfigurationError([foreign])
    return choice


async def _choice(settings: Settings, connection: AsyncConnection) -> tuple[list[Finding], bool]:
    try:
        choice = await chosen(settings, connection)
    except ConfigurationError as error:
        detail, _, remedy = error.problems[0].partition(": run ")
        return [Finding("delivery", "problem", detail, f"run {remedy}" if remedy else "")], False
    return [Finding("delivery", "ok", f"{choice.delivery} ({choice.reason})")], choice.delivery == "proven"


async def _transport(settings: Settings, found: Finding) -> Finding:
    """Add how the log is read."""
    direct = settings.database_direct_url
    try:
        transport = await choose_transport(
            settings.database_url.get_secret_value(), direct.get_secret_value() if direct else None
        )
    except WalError as error:
        return Finding("delivery", "problem", f"the log cannot be read: {error}")
    how = "streamed" if transport.kind == "stream" else "read in windows by SQL"
    remedy = ""
    if transport.kind == "windows" and direct is None:
        remedy = "set DATABASE_DIRECT_URL to a direct address, with less delay and load; windows do as well"
    return found._replace(detail=f"{found.detail}; log {how}: {transport.reason}", remedy=remedy)
