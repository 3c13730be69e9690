"""The transaction in which a person's decision is carried out, beside workers and a listener that go on.

The rows of the lanes concerned come first, in their order, and are waited for; whatever else is needed is
taken without waiting. So no circle of waits can form, and nobody is held up for longer than a moment.
Nothing here knows what is decided.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker.database import is_conflict, is_locked
from worker.errors import Refused

T = TypeVar("T")

TRIES = 10
AGAIN_SECONDS = 0.05
LOCK_MS = 5_000
"""For the row of a lane: longer than most passes."""

# The lanes must not stay locked where this process is frozen or killed.
_LIMITS = text(
    "select set_config('lock_timeout', :lock, true),"
    " set_config('idle_in_transaction_session_timeout', '10000', true),"
    " set_config('client_connection_check_interval', '1000', true)"
)
_LANES = text(
    "select lane from tailrace.lanes where handler = :handler and lane = any(cast(:lanes as integer[]))"
    " order by lane for update"
)
_COUNT = text("select coalesce(lanes, 0) from tailrace.source")
# A listener that changes the number of lanes holds this row; one that renews its lease holds it for a moment.
_SAME_COUNT = text("select coalesce(lanes, 0) from tailrace.source for share nowait")
_HOLDING = text(
    "update tailrace.lanes set holding = holding + :rows where handler = :handler and lane = :lane"
)


class LanesChangedError(Exception):
    """The number of lanes was changed just now."""


async def in_one_transaction(
    engine: AsyncEngine, step: Callable[[AsyncSession], Awaitable[T]], *, about: str
) -> T:
    """Do a step in a transaction, and again where somebody else was in the way.

    Raises:
        Refused: somebody was in the way all the time.
    """
    for _ in range(TRIES):
        try:
            async with AsyncSession(engine, expire_on_commit=False) as session, session.begin():
                connection = await session.connection()
                await connection.execute(_LIMITS, {"lock": str(LOCK_MS)})
                return await step(session)
        except Exception as error:
            if not (is_locked(error) or is_conflict(error) or isinstance(error, LanesChangedError)):
                raise
        await asyncio.sleep(AGAIN_SECONDS)
    raise Refused(f"the lanes of {about} are busy all the time: try again")


async def lock_lanes(connection: AsyncConnection, handler: str, lanes: Sequence[int]) -> set[int]:
    """Take the rows of lanes; return those that there are."""
    parameters = {"handler": handler, "lanes": list(lanes)}
    return {row[0] for row in await connection.execute(_LANES, parameters)}


async def count_lanes(connection: AsyncConnection) -> int:
    """Tell how many lanes a handler has; 0 where no listener has run yet."""
    return int((await connection.execute(_COUNT)).scalar_one())


async def keep_count(connection: AsyncConnection, count: int) -> None:
    """See to it that the number of lanes stays as it was read until the transaction ends.

    Raises:
        LanesChangedError: it has changed.
    """
    if (await connection.execute(_SAME_COUNT)).scalar_one() != count:
        raise LanesChangedError


async def count_holding(connection: AsyncConnection, handler: str, rows: Mapping[int, int]) -> None:
    """Count held rows that concern lanes (so many more for each of them), under their locks."""
    if rows:
        counts = [{"handler": handler, "lane": lane, "rows": number} for lane, number in rows.items()]
        await connection.execute(_HOLDING, counts)
