"""The replication slot: made, found, judged, moved; and what must be remembered to judge it.

Statements and rules; when they are used, and what is written down in between, is for the caller. A confirmed
position that goes back is no loss: a crash of Postgres does that. One ahead of what was recorded is: somebody
else has moved the slot.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.catalogue import quote

PLUGIN: Final = "pgoutput"

_SERVER: Final = text(
    """
    select cast((select system_identifier from pg_catalog.pg_control_system()) as text) as system_identifier,
           pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_insert_lsn()) as walfile,
           pg_catalog.pg_postmaster_start_time() as started_at,
           pg_catalog.pg_current_wal_flush_lsn() as flushed
    """
)
# Columns of the view differ between versions: as one document, those that are not there are simply missing.
_SLOT: Final = text(
    """
    select pg_catalog.to_jsonb(s) as slot, s.database = pg_catalog.current_database() as ours,
           s.confirmed_flush_lsn as confirmed,
           s.restart_lsn as restart,
           pg_catalog.pg_current_wal_lsn() - s.restart_lsn as retained,
           pg_catalog.current_setting('max_slot_wal_keep_size') as keep_size
    from pg_catalog.pg_replication_slots s where s.slot_name = :slot
    """
)
_UNLIMITED: Final = text("select pg_catalog.set_config('statement_timeout', '0', true)")
_CREATE: Final = text("select lsn from pg_catalog.pg_create_logical_replication_slot(:slot, :plugin)")
_COPY: Final = text("select lsn from pg_catalog.pg_copy_logical_replication_slot(:slot, :copy, false)")
_CONFIRMED: Final = text(
    "select confirmed_flush_lsn from pg_catalog.pg_replication_slots where slot_name = :slot"
)
# The driver takes and gives an LSN as a number.
_ADVANCE: Final = text(
    "select end_lsn from pg_catalog.pg_replication_slot_advance(:slot, cast(:lsn as pg_catalog.pg_lsn))"
)
_TERMINATE: Final = text(
    "select pg_catalog.pg_terminate_backend(active_pid) from pg_catalog.pg_replication_slots"
    " where slot_name = :slot and active_pid is not null"
)
_PERMISSION: Final = text(
    """
    select current_user as me, r.rolreplication or r.rolsuper as may,
           current_setting('wal_level') as wal_level,
           cast(current_setting('max_replication_slots') as int) as slots,
           (select count(*) from pg_catalog.pg_replication_slots) as used,
           coalesce(pg_catalog.pg_has_role(
               current_user, pg_catalog.to_regrole('rds_replication')::oid, 'usage'), false) as by_role,
           exists (select from pg_catalog.pg_replication_slots where slot_name = :slot) as there
    from pg_catalog.pg_roles r where r.rolname = current_user
    """
)


def as_text(lsn: int) -> str:
    """Write an LSN as Postgres does."""
    return f"{lsn >> 32:X}/{lsn & 0xFFFFFFFF:X}"


class Server(NamedTuple):
    """Which server this is, at which point of its history."""

    system_identifier: str
    """Of the cluster; another one is another history."""
    timeline: int
    """Goes up by one at a promotion or a restore."""
    started_at: str
    """Start of the postmaster, ISO."""
    flushed: int
    """LSN up to which the log is on disk."""


class SlotState(NamedTuple):
    """What Postgres says of the slot."""

    name: str
    plugin: str
    ours: bool
    """It belongs to this database."""
    temporary: bool
    two_phase: bool
    active_pid: int | None
    """Backend that reads from it."""
    confirmed: int
    """LSN below which all commits are done with."""
    restart: int
    """LSN from which on the log is kept for it."""
    wal_status: str
    """reserved, extended, unreserved or lost."""
    invalidation_reason: str | None
    """Why it is lost (from PostgreSQL 17 on)."""
    retained_bytes: int
    """Log that is kept for it."""
    safe_wal_size: int | None
    """Bytes of log that may be written before it is in danger; None where nothing limits it."""
    keep_size: str
    """max_slot_wal_keep_size, as set."""


class Recorded(NamedTuple):
    """What the owner of the slot wrote down when it last moved it."""

    target: int
    """LSN up to which it may have been moved."""
    system_identifier: str
    timeline: int


Finding = Literal["fine", "missing", "lost", "foreign", "ahead", "history"]


class Judgement(NamedTuple):
    """Whether reading may go on where it stood."""

    finding: Finding
    """missing, lost or foreign: the slot must be made (anew). ahead or history: it can be read, but changes
    are missing. All but fine are a gap."""
    reason: str
    """In words, for people; empty if fine."""


class Permission(NamedTuple):
    """Whether this user may have a slot on this server."""

    allowed: bool
    reason: str
    """Why not, with what to do; empty if allowed."""


async def read_server(connection: AsyncConnection) -> Server:
    """Ask which server this is. Needs no privilege, and works through poolers."""
    row = (await connection.execute(_SERVER)).one()
    timeline = int(row.walfile[:8], 16)
    return Server(row.system_identifier, timeline, row.started_at.isoformat(), int(row.flushed))


async def read_slot(connection: AsyncConnection, name: str) -> SlotState | None:
    """Look at the slot; None if it does not exist."""
    row = (await connection.execute(_SLOT, {"slot": name})).one_or_none()
    if row is None:
        return None
    said: Mapping[str, Any] = msgspec.json.decode(row.slot) if isinstance(row.slot, str) else row.slot
    safe = said.get("safe_wal_size")
    return SlotState(
        name=name,
        plugin=said["plugin"] or "",
        ours=bool(row.ours),
        temporary=bool(said.get("temporary")),
        two_phase=bool(said.get("two_phase")),
        active_pid=said.get("active_pid"),
        confirmed=int(row.confirmed or 0),
        restart=int(row.restart or 0),
        wal_status=said.get("wal_status") or "lost",
        invalidation_reason=said.get("invalidation_reason"),
        retained_bytes=int(row.retained or 0),
        safe_wal_size=None if safe is None else int(safe),
        keep_size=row.keep_size,
    )


def judge(
    slot: SlotState | None, server: Server, recorded: Recorded | None, *, reached: int = 0
) -> Judgement:
    """Judge whether everything since the last record can still be read.

    Args:
        slot: as it is now.
        server: as it is now.
        recorded: as written down before; None at the very first start.
        reached: LSN up to which the log of this cluster was read, as remembered outside the database.
    """
    if slot is None:
        return Judgement("missing", "the replication slot does not exist")
    return _unusable(slot) or _discontinuous(slot, server, recorded, reached) or Judgement("fine", "")


def _unusable(slot: SlotState) -> Judgement | None:
    # First, for a slot that is lost is dropped: a physical one without a reader looks like that.
    if slot.plugin != PLUGIN or not slot.ours or slot.temporary or slot.two_phase:
        return Judgement("foreign", _foreign(slot))
    if slot.wal_status == "lost" or slot.invalidation_reason:
        why = slot.invalidation_reason or f"max_slot_wal_keep_size is {slot.keep_size}"
        return Judgement("lost", f'the replication slot "{slot.name}" has lost the log it needs ({why})')
    return None


def _discontinuous(
    slot: SlotState, server: Server, recorded: Recorded | None, reached: int
) -> Judgement | None:
    if recorded is None:
        return None
    if recorded.system_identifier != server.system_identifier:
        return Judgement("history", "this is another database cluster than before")
    if recorded.timeline != server.timeline:
        reason = (
            f"the database was restored or failed over (timeline {recorded.timeline} to {server.timeline})"
        )
        return Judgement("history", reason)
    if server.flushed < reached:
        reason = (
            f"the database was restored: its log ends at {as_text(server.flushed)},"
            f" and was read up to {as_text(reached)} before"
        )
        return Judgement("history", reason)
    if slot.confirmed > recorded.target:
        reason = (
            f'the replication slot "{slot.name}" was moved or made anew by somebody else: it stands at '
            f"{as_text(slot.confirmed)}, and was moved by us to {as_text(recorded.target)} at most"
        )
        return Judgement("ahead", reason)
    return None


def _foreign(slot: SlotState) -> str:
    flaws = [
        (not slot.ours, "belongs to another database"),
        (slot.plugin != PLUGIN, f"uses the plugin {slot.plugin or 'of physical replication'}, not {PLUGIN}"),
        (slot.temporary, "is temporary"),
        (slot.two_phase, "has two-phase decoding on"),
    ]
    found = " and ".join(words for wrong, words in flaws if wrong)
    return f'the replication slot "{slot.name}" {found}: drop it, or set WORKER_SLOT to another name'


async def create_slot(connection: AsyncConnection, name: str) -> int:
    """Make the slot, durable; waits for transactions that are open now.

    Returns:
        The LSN from which on commits will be read.

    Raises:
        sqlalchemy.exc.DBAPIError: it exists already, or it may not be made (see `read_permission`).
    """
    # Its transaction must have written nothing before, and ends at once, so as to hold up no other. It takes
    # as long as the oldest open transaction, which is longer than hosted projects allow for a statement.
    await connection.execute(_UNLIMITED)
    found = await connection.execute(_CREATE, {"slot": name, "plugin": PLUGIN})
    lsn = int(found.scalar_one())
    await connection.commit()
    return lsn


async def copy_slot(connection: AsyncConnection, name: str, copy: str) -> int:
    """Copy a slot, also one that is being read; returns the LSN from which on the copy gives commits.

    Raises:
        sqlalchemy.exc.DBAPIError: there is no place for one more, or the slot has lost its log.
    """
    await connection.execute(_COPY, {"slot": name, "copy": copy})
    found = await connection.execute(_CONFIRMED, {"slot": copy})
    lsn = int(found.scalar_one())
    await connection.commit()
    return lsn


async def drop_slot(connection: AsyncConnection, name: str) -> None:
    """Drop the slot, if it exists; nobody may be reading from it."""
    await connection.execute(
        text(
            "select pg_catalog.pg_drop_replication_slot(slot_name)"
            " from pg_catalog.pg_replication_slots where slot_name = :slot"
        ),
        {"slot": name},
    )
    await connection.commit()


async def advance_slot(connection: AsyncConnection, name: str, lsn: int) -> int:
    """Move a slot that nobody reads from; never back.

    Postgres clamps a target that is not flushed yet, and refuses one that is behind the slot: that is no
    error, the slot is where it should be.

    Returns:
        The LSN at which the slot stands, or the target where it stood beyond that already.
    """
    try:
        found = await connection.execute(_ADVANCE, {"slot": name, "lsn": lsn})
        reached = int(found.scalar_one())
        await connection.commit()
    except DBAPIError as error:
        if "minimum is" not in str(error.orig):
            raise
        await connection.rollback()
        return lsn
    return reached


async def terminate_holder(connection: AsyncConnection, name: str, *, seconds: float = 5.0) -> bool:
    """End the session that reads from the slot; for whoever holds the lease, and with it the slot.

    Returns:
        Whether the slot is free afterwards.

    Raises:
        sqlalchemy.exc.DBAPIError: the session belongs to a user that we may not end (42501).
    """
    async with asyncio.timeout(seconds + 10):
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            ended = (await connection.execute(_TERMINATE, {"slot": name})).first()
            await connection.commit()
            if ended is None:
                return True
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.02)  # the end of a backend sends no signal


async def read_permission(connection: AsyncConnection, name: str) -> Permission:
    """Find out whether the user may have the slot."""
    row = (await connection.execute(_PERMISSION, {"slot": name})).one()
    if row.wal_level != "logical":
        reason = (
            f"wal_level is {row.wal_level}: run `alter system set wal_level = logical` and restart Postgres"
        )
        return Permission(allowed=False, reason=reason)
    if not (row.may or row.by_role):
        me = quote(row.me)
        reason = f"the user {me} may not replicate: run `alter role {me} replication` as a superuser"
        return Permission(allowed=False, reason=reason)
    if not row.there and row.used >= row.slots:
        reason = (
            f"all {row.slots} replication slots are taken: drop an unused one or raise max_replication_slots"
        )
        return Permission(allowed=False, reason=reason)
    return Permission(allowed=True, reason="")
