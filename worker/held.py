"""Changes that wait in Postgres: for a retry of their own, or behind an earlier one of their key.

Rows are written in the transaction that moves the lane's position, and read under the lane's lock. What to
do with a failure (how often, how long to wait) is decided in retries.py.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.change import Position
from worker.lanes import Lane
from worker.retries import Failure

MOST_AT_ONCE = 200
"""Held rows looked at in one pass over a lane: a long queue behind a key must not fill memory."""


class HeldRow(NamedTuple):
    """A change that waits."""

    id: int
    lanes: tuple[int, ...]
    keys: tuple[bytes, ...]
    position: Position
    source: str
    payload: bytes
    changes: int
    attempts: int
    due: bool


_SELECT = text(
    "select id, lanes, keys, lsn, ordinal, source, payload, changes, attempts,"
    " next_attempt_at is null or next_attempt_at <= clock_timestamp()"
    " from tailrace.held where handler = :handler and :lane = any(lanes) and status = 'retrying'"
    " order by id limit :most"
)
_KEYS = text(
    "select distinct unnest(keys) from tailrace.held"
    " where handler = :handler and lanes && :lanes and status <> 'dead'"
)
_INSERT = text(
    "insert into tailrace.held (handler, lanes, keys, lsn, ordinal, source, payload, changes, attempts, status,"
    " next_attempt_at, error_class, error, traceback, first_failed_at, last_failed_at)"
    " values (:handler, :lanes, :keys, :lsn, :ordinal, :source, :payload, :changes, :attempts, :status,"
    " clock_timestamp() + make_interval(secs => :delay), :error_class, :error, :traceback,"
    " case when :attempts > 0 then clock_timestamp() end, case when :attempts > 0 then clock_timestamp() end)"
)
_FAILED = text(
    "update tailrace.held set attempts = attempts + 1, status = :status,"
    " next_attempt_at = clock_timestamp() + make_interval(secs => :delay), error_class = :error_class,"
    " error = :error, traceback = :traceback, last_failed_at = clock_timestamp(),"
    " first_failed_at = coalesce(first_failed_at, clock_timestamp()) where id = :id"
)
_ABSORB = text(
    "update tailrace.held set changes = changes + :changes where id = ("
    "select min(id) from tailrace.held where handler = :handler and :key = any(keys) and status <> 'dead')"
)
_DELETE = text("delete from tailrace.held where id = :id")
_DUE = text(
    "select distinct handler, unnest(lanes) from tailrace.held"
    " where status = 'retrying' and next_attempt_at <= clock_timestamp()"
)
_NEXT = text("select min(next_attempt_at) from tailrace.held where handler = :handler and :lane = any(lanes)")


async def waiting(session: AsyncSession, lane: Lane) -> list[HeldRow]:
    """Read what waits in a lane, in the order in which it is to be applied."""
    connection = await session.connection()
    parameters = {"handler": lane.handler, "lane": lane.number, "most": MOST_AT_ONCE}
    found = await connection.execute(_SELECT, parameters)
    return [
        HeldRow(
            row[0],
            tuple(row[1]),
            tuple(key.encode() for key in row[2]),
            Position(row[3], row[4]),
            row[5],
            row[6] or b"",
            row[7],
            row[8],
            row[9],
        )
        for row in found
    ]


async def held_keys(session: AsyncSession, handler: str, lanes: Sequence[int]) -> set[bytes]:
    """List the lane keys that wait in any of these lanes."""
    connection = await session.connection()
    found = await connection.execute(_KEYS, {"handler": handler, "lanes": list(lanes)})
    return {row[0].encode() for row in found}


async def hold(
    session: AsyncSession,
    handler: str,
    *,
    lanes: Sequence[int],
    keys: Sequence[bytes],
    position: Position,
    source: str,
    payload: bytes,
    changes: int = 1,
    failure: Failure | None = None,
) -> None:
    """Hold a change: after its own failure, or (without one) behind an earlier change of its key."""
    connection = await session.connection()
    await connection.execute(
        _INSERT,
        {
            "handler": handler,
            "lanes": list(lanes),
            "keys": [key.decode() for key in keys],
            "lsn": position.lsn,
            "ordinal": position.ordinal,
            "source": source,
            "payload": payload,
            "changes": changes,
            "attempts": 1 if failure else 0,
            "status": _status(failure),
            "delay": failure.delay if failure else None,
            "error_class": failure.error_class if failure else None,
            "error": failure.error if failure else None,
            "traceback": failure.traceback if failure else None,
        },
    )


async def absorb(session: AsyncSession, handler: str, key: bytes, changes: int) -> None:
    """Let a held derive key stand for further changes: its retry computes from what is there then."""
    connection = await session.connection()
    await connection.execute(_ABSORB, {"handler": handler, "key": key.decode(), "changes": changes})


async def failed_again(session: AsyncSession, row: HeldRow, failure: Failure) -> None:
    """Note that a retry failed."""
    connection = await session.connection()
    await connection.execute(
        _FAILED,
        {
            "id": row.id,
            "status": _status(failure),
            "delay": failure.delay,
            "error_class": failure.error_class,
            "error": failure.error,
            "traceback": failure.traceback,
        },
    )


def _status(failure: Failure | None) -> str:
    return "dead" if failure is not None and failure.delay is None else "retrying"


async def let_go(session: AsyncSession, row: HeldRow) -> None:
    """Forget a held change: it is applied."""
    connection = await session.connection()
    await connection.execute(_DELETE, {"id": row.id})


async def due_lanes(connection: AsyncConnection) -> list[Lane]:
    """List the lanes in which a retry is due."""
    return [Lane(row[0], row[1]) for row in await connection.execute(_DUE)]


async def next_attempt(connection: AsyncConnection, lane: Lane) -> datetime | None:
    """Tell when the next retry of a lane is due."""
    found = await connection.execute(_NEXT, {"handler": lane.handler, "lane": lane.number})
    value: datetime | None = found.scalar_one()
    return value
