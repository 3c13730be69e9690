"""One active listener: lease and generation are one row in Postgres.

A listener may read the source, write lanes and record gaps only while the row carries its token. Renewal
asks for exactly that token, so a listener that slept through its lease finds out that it must start again.
"""

import secrets
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.change import Position
from worker.database import is_locked, singly
from worker.frozen import end_frozen
from worker.lanes import FORMAT, LeaseLostError, check_format

LEASE_SECONDS = 8
RENEW_SECONDS = 2
IDLE_MS = 5_000
WAIT_MS = 2_000
FROZEN_SECONDS = IDLE_MS / 1000 + 1
"""After the lease was taken: whoever had it before and is in the middle of a statement is frozen by then."""
_UNFROZEN = f"set_config('idle_in_transaction_session_timeout', '{IDLE_MS}', true)"


def limited(statement: str) -> TextClause:
    """Complete a statement that locks the row, given up to its `returning`, with a limit to its transaction.

    A listener that is frozen in the middle of one would otherwise keep the row, and nobody else could take
    the lease, however long it has ended: kernels answer the keep-alives of a stopped process.
    """
    return text(f"{statement} {_UNFROZEN}")


_TAKE = limited(
    "update tailrace.source set lease_token = :token, lease_holder = :holder,"
    " lease_until = clock_timestamp() + make_interval(secs => :seconds)"
    " where (lease_until < clock_timestamp() or lease_token is null) and format <= :format"
    " returning"
)
# Not limited: it is committed by Postgres as soon as it is done, whatever becomes of who has sent it.
_RENEW = text(
    "update tailrace.source set lease_until = clock_timestamp() + make_interval(secs => :seconds),"
    " live_at = coalesce(cast(:sure as timestamptz), live_at)"
    " where lease_token = :token and format <= :format"
    " returning id"
)
_GIVE_UP = limited(
    "update tailrace.source set lease_token = null, lease_until = '-infinity',"
    " live_at = coalesce(cast(:sure as timestamptz), live_at) where lease_token = :token"
    " returning"
)
_GENERATION = limited(
    "update tailrace.source set generation = :generation, floor_lsn = :lsn, floor_ordinal = :ordinal"
    " where lease_token = :token returning"
)
# Whoever has the row and does not let go of it may be found frozen at the next try.
_WAIT_BRIEFLY = text(f"set local lock_timeout = {WAIT_MS}")
_FORMAT = text("select format from tailrace.source")
_LIVE = text(f"select live_at, {_UNFROZEN} from tailrace.source")  # noqa: S608 - a constant of ours


class Holder(NamedTuple):
    """Who has the lease."""

    name: str
    seconds_left: float


def new_name() -> str:
    """Make a random name: a counter would repeat itself after a restore."""
    return secrets.token_hex(8)


async def take(engine: AsyncEngine, token: str, holder: str) -> bool:
    """Take the lease where nobody has it.

    Raises:
        NewerFormat: whoever has it must be of a newer version than this one.
    """
    try:
        async with engine.begin() as connection:
            parameters = {"token": token, "holder": holder, "seconds": LEASE_SECONDS, "format": FORMAT}
            await end_frozen(connection, IDLE_MS / 1000)
            await connection.execute(_WAIT_BRIEFLY)
            if (await connection.execute(_TAKE, parameters)).one_or_none() is not None:
                return True
            check_format((await connection.execute(_FORMAT)).scalar_one())
    except DBAPIError as error:
        if not is_locked(error):
            raise
    return False


async def end_frozen_before(engine: AsyncEngine) -> None:
    """End what the listener before was in the middle of, and may keep locked, if it was frozen just then.

    Where the lease was taken sooner than a session counts as frozen, taking it has found nothing.
    """
    async with singly(engine) as connection:
        await end_frozen(connection, IDLE_MS / 1000)


async def renew(engine: AsyncEngine, token: str, sure: object) -> None:
    """Renew the lease, and note up to when the source was surely read (None: no news).

    Raises:
        LeaseLostError: somebody else has taken it.
    """
    async with singly(engine) as connection:
        parameters = {"token": token, "seconds": LEASE_SECONDS, "sure": sure, "format": FORMAT}
        if (await connection.execute(_RENEW, parameters)).one_or_none() is None:
            raise LeaseLostError("another listener has taken over")


async def give_up(engine: AsyncEngine, token: str, sure: object) -> None:
    """Let the next listener have the lease at once."""
    async with engine.begin() as connection:
        await connection.execute(_GIVE_UP, {"token": token, "sure": sure})


async def set_generation(connection: AsyncConnection, token: str, generation: str, floor: Position) -> None:
    """Put a generation in force, in the caller's transaction.

    Raises:
        LeaseLostError: somebody else has the lease.
    """
    parameters = {"token": token, "generation": generation, "lsn": floor.lsn, "ordinal": floor.ordinal}
    if (await connection.execute(_GENERATION, parameters)).one_or_none() is None:
        raise LeaseLostError("another listener has taken over")


async def live_since(connection: AsyncConnection) -> datetime | None:
    """Tell up to when the source was surely read before this start; None at the very first.

    From then on it counts as read: a listener that is killed before it is subscribed leaves a gap too.
    """
    live_at: datetime | None = (await connection.execute(_LIVE)).one()[0]
    if live_at is None:
        await connection.execute(text("update tailrace.source set live_at = clock_timestamp()"))
    return live_at


async def holder(connection: AsyncConnection) -> Holder | None:
    """Tell who has the lease; None where nobody has."""
    row = (
        await connection.execute(
            text(
                "select lease_holder, extract(epoch from lease_until - clock_timestamp())::float8"
                " from tailrace.source where lease_until > clock_timestamp()"
            )
        )
    ).one_or_none()
    return Holder(row[0], row[1]) if row else None
