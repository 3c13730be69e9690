"""Examines the replication slots of the server: what they keep, how much of it they may, and who reads them.

A slot that nobody reads keeps the log on the server's disk for ever; one that may keep too little loses what
a listener would have read after an outage.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.check.findings import Finding, Fix, size
from worker.reading.retention import endangered
from worker.wal.slot import SlotState, judge, read_server, read_slot

LEAST_HOURS = 1.0
"""What a slot may keep should last for so long at least: an outage that nobody mends sooner is common."""
LEAST_SAMPLE_SECONDS = 3600
"""Statistics of a shorter time tell nothing of the usual rate."""

_SLOTS = text(
    """
    select pg_catalog.to_jsonb(s) as said,
           coalesce(pg_catalog.pg_current_wal_lsn() - s.restart_lsn, 0)::int8 as kept
    from pg_catalog.pg_replication_slots s order by s.slot_name
    """
)
_LIMITS = text(
    """
    select pg_catalog.current_setting('max_slot_wal_keep_size') as keep,
           (select setting::int8 from pg_catalog.pg_settings
            where name = 'max_slot_wal_keep_size') as keep_mb,
           pg_catalog.current_setting('max_replication_slots')::int as most,
           pg_catalog.current_setting('idle_replication_slot_timeout', true) as idle,
           (select setting::int8 from pg_catalog.pg_settings
            where name = 'idle_replication_slot_timeout') as idle_time
    """
)
_RATE = text(
    "select wal_bytes::float8 as bytes,"
    " extract(epoch from clock_timestamp() - stats_reset)::float8 as seconds from pg_catalog.pg_stat_wal"
)
_HAS_RATE = text("select pg_catalog.to_regclass('pg_catalog.pg_stat_wal') is not null")


class _Slot(NamedTuple):
    said: Mapping[str, Any]
    kept: int

    @property
    def name(self) -> str:
        return str(self.said["slot_name"])

    @property
    def is_left(self) -> bool:
        """Nobody reads it, and it stays."""
        return not self.said["active"] and not self.said["temporary"]

    @property
    def is_lost(self) -> bool:
        return self.said.get("wal_status") == "lost"


async def examine_slots(connection: AsyncConnection, name: str, *, proven: bool) -> list[Finding]:
    """Return what is to be said of all slots of the server.

    Args:
        connection: of any user; everybody may see the slots.
        name: of our own.
        proven: whether the delivery needs it.
    """
    slots = [_Slot(_document(row.said), int(row.kept)) for row in await connection.execute(_SLOTS)]
    limits = (await connection.execute(_LIMITS)).one()
    found = [_left(one, limits.keep) for one in slots if one.is_left and not (proven and one.name == name)]
    if proven:
        found += await _own(connection, name)
        found += [*_keep_size(limits, await _rate(connection)), *_idle(limits)]
    if not any(one.is_wrong for one in found):
        kept = max((one.kept for one in slots), default=0)
        detail = f"{len(slots)} of {limits.most} are taken, {size(kept)} of the log is kept for them"
        found.insert(0, Finding("slots", "ok", detail))
    return found


def _left(slot: _Slot, keep: str) -> Finding:
    what = slot.said.get("plugin") or "physical"
    if slot.is_lost:
        detail = f'replication slot "{slot.name}" ({what}) has lost its log, and takes up a place'
    else:
        bound = "without any limit" if keep == "-1" else f"up to {keep}"
        detail = f'replication slot "{slot.name}" ({what}) is read by nobody and keeps {size(slot.kept)}'
        detail += f" of the log, {bound}"
    quoted = slot.name.replace("'", "''")
    statement = f"select pg_drop_replication_slot('{quoted}');"
    remedy = f"if nobody needs it, run: python -m worker check --fix --drop-slot {slot.name}"
    return Finding("slots", "warning", detail, remedy, (Fix("sql", statement, slot.name),))


def _document(said: Any) -> Mapping[str, Any]:  # noqa: ANN401 - as the driver gives it
    return msgspec.json.decode(said) if isinstance(said, str) else said  # type: ignore[no-any-return]


async def _own(connection: AsyncConnection, name: str) -> Sequence[Finding]:
    slot = await read_slot(connection, name)
    if slot is None:
        return ()
    judged = judge(slot, await read_server(connection), None)
    if judged.finding == "lost":
        remedy = "the listener makes it anew, with a gap; raise max_slot_wal_keep_size"
        return (Finding("slot", "warning", judged.reason, remedy),)
    if judged.finding == "foreign":
        return ()  # told as what is wrong with the delivery
    if danger := endangered(slot):
        return (Finding("slot", "warning", danger),)
    return (_kept(slot),)


def _kept(slot: SlotState) -> Finding:
    detail = f'"{slot.name}" keeps {size(slot.retained_bytes)} of the log'
    detail += f" (max_slot_wal_keep_size is {slot.keep_size})"
    if slot.active_pid is None:
        detail += "; nobody reads from it now"
    return Finding("slot", "ok", detail)


async def _rate(connection: AsyncConnection) -> float | None:
    """Give the bytes of log that are written in a second, on the average; None where nobody knows."""
    if not await connection.scalar(_HAS_RATE):
        return None
    row = (await connection.execute(_RATE)).one()
    if row.seconds is None or row.seconds < LEAST_SAMPLE_SECONDS or not row.bytes:
        return None
    return float(row.bytes / row.seconds)


def _keep_size(limits: Any, rate: float | None) -> list[Finding]:  # noqa: ANN401 - a row
    raise_ = "run: alter system set max_slot_wal_keep_size = '{}'; select pg_reload_conf();"
    if limits.keep_mb < 0:
        detail = "max_slot_wal_keep_size is -1: while no listener reads, the log grows until the disk is full"
        return [Finding("max_slot_wal_keep_size", "warning", detail, raise_.format("4GB") + _HOSTED)]
    if rate is None:
        return [Finding("max_slot_wal_keep_size", "ok", limits.keep)]
    hours = limits.keep_mb * 1024 * 1024 / rate / 3600
    lasts = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"  # noqa: PLR2004 - two days
    detail = f"{limits.keep}: at {size(rate * 60)} of log a minute, the average, enough for {lasts}"
    if hours >= LEAST_HOURS:
        return [Finding("max_slot_wal_keep_size", "ok", detail)]
    detail += "; a listener that is away for longer finds its slot lost, which is a gap"
    enough = max(1, round(rate * 3600 * 4 / 1024**3))
    return [Finding("max_slot_wal_keep_size", "warning", detail, raise_.format(f"{enough}GB") + _HOSTED)]


_HOSTED = " (as a superuser; hosted: in the project's database settings)"


def _idle(limits: Any) -> list[Finding]:  # noqa: ANN401 - a row
    if not limits.idle_time:
        return []
    detail = (
        f"idle_replication_slot_timeout is {limits.idle}: a listener that is away for longer loses its slot"
    )
    remedy = "run: alter system set idle_replication_slot_timeout = 0; select pg_reload_conf();"
    return [Finding("slots", "warning", detail, remedy + _HOSTED)]
