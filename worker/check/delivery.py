"""Examines the delivery: whether the database allows the one that is wanted, and how its log is read."""

import asyncpg
from sqlalchemy.exc import SQLAlchemyError

from config.settings import Settings
from worker.check.findings import Finding
from worker.database import explain, make_engine
from worker.delivery import UNPROTECTED, choose
from worker.errors import ConfigurationError
from worker.wal.failures import WalError
from worker.wal.reader import choose_transport
from worker.wal.slot import SlotState, judge, read_permission, read_server, read_slot


async def examine_delivery(settings: Settings) -> list[Finding]:
    """Return what is to be said of WORKER_DELIVERY. Plain delivery asks nothing of the database."""
    if settings.delivery in ("plain", "webhooks"):
        choice = choose(settings.delivery)
        if settings.delivery == "webhooks" and settings.hook_secret is None:
            return [Finding("delivery", "problem", UNPROTECTED)]
        return [Finding("delivery", "ok", f"{choice.delivery} ({choice.reason})")]
    try:
        return await _examine(settings)
    except (SQLAlchemyError, asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        return [Finding("delivery", "skipped", f"nobody knows what the database allows: {explain(error)}")]


async def _examine(settings: Settings) -> list[Finding]:
    url, direct = settings.database_url.get_secret_value(), settings.database_direct_url
    engine = make_engine(url, name="tailrace check", size=1)
    try:
        async with engine.connect() as connection:
            permission = await read_permission(connection, settings.slot)
            slot = await read_slot(connection, settings.slot)
            judgement = judge(slot, await read_server(connection), None)
    finally:
        await engine.dispose()
    foreign = judgement.reason if judgement.finding == "foreign" else ""
    try:
        choice = choose(
            settings.delivery, allowed=permission.allowed, why_not=permission.reason, taken=foreign
        )
    except ConfigurationError as error:
        detail, _, remedy = error.problems[0].partition(": run ")
        return [Finding("delivery", "problem", detail, f"run {remedy}" if remedy else "")]
    if choice.delivery == "plain":
        return [Finding("delivery", "ok", f"plain ({choice.reason})")]
    if foreign:
        return [Finding("delivery", "problem", foreign)]
    try:
        transport = await choose_transport(url, direct.get_secret_value() if direct else None)
    except WalError as error:
        return [Finding("delivery", "problem", f"the log cannot be read: {error}")]
    how = "streamed" if transport.kind == "stream" else "read in windows by SQL"
    found = [Finding("delivery", "ok", f"proven ({choice.reason}); log {how}: {transport.reason}")]
    if slot is not None:
        found.append(_slot(slot, lost=judgement.reason if judgement.finding == "lost" else ""))
    return found


def _slot(slot: SlotState, *, lost: str) -> Finding:
    if lost:
        remedy = "the listener makes it anew, with a gap; raise max_slot_wal_keep_size"
        return Finding("slot", "warning", lost, remedy)
    detail = f'"{slot.name}" keeps {slot.retained_bytes} bytes of the log'
    return Finding("slot", "ok", f"{detail} (max_slot_wal_keep_size is {slot.keep_size})")
