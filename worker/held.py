"""Changes that wait in Postgres: for a retry of their own, or behind an earlier one of their key.

Rows are written in the transaction that moves the lane's position, and read under the lane's lock. The order
of a key is the order of ids. What waits for its own retry has a time at which it is due; what waits behind
another has none, until it is the first of one of its keys (see `promote`). How often and how long is decided
in retries.py.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.change import Position
from worker.lanes import Lane
from worker.retries import Failure

MOST_AT_ONCE = 50
"""Held rows read at a time: many keys that are due together must not fill memory."""


class Kept(NamedTuple):
    """What is kept of a change, or of a derive handler's key."""

    lanes: tuple[int, ...]
    """In rising order; the first of them retries."""
    keys: tuple[bytes, ...]
    """Empty for a TRUNCATE, which concerns every key: it waits for all before it, and all after it wait."""
    position: Position
    source: str
    """As in a lane's entry; "key" for the key of a derive handler."""
    payload: bytes
    changes: int = 1
    """Changes for which it stands."""


class HeldRow(NamedTuple):
    """A change that waits."""

    id: int
    kept: Kept
    attempts: int
    redriven: bool = False
    """A person has asked for it to be tried again."""
    history: str = ""
    """To which its position belongs."""


class Blocked:
    """Keys behind which changes of a handler wait; or all keys, behind a TRUNCATE."""

    def __init__(self, keys: Iterable[bytes] = (), *, everything: bool = False) -> None:
        self.keys = set(keys)
        self.everything = everything

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return self.everything or bool(self.keys)

    def holds_back(self, keys: Sequence[bytes]) -> bool:
        """Tell whether a change with these keys has to wait; without keys it waits for any."""
        return self.everything or not self.keys.isdisjoint(keys) or (not keys and bool(self.keys))

    def add(self, keys: Sequence[bytes]) -> None:
        """Let later changes wait behind one with these keys."""
        self.keys.update(keys)
        self.everything = self.everything or not keys


# Only rows that nothing of their keys stands before: with several keys, one may be first and another not yet.
_DUE = text(
    "select id, lanes, keys, lsn, ordinal, source, payload, changes, attempts, redriven,"
    " history from tailrace.held h"
    " where handler = :handler and lanes[1] = :lane and status = 'retrying'"
    " and next_attempt_at <= clock_timestamp() and id <> all (cast(:seen as bigint[]))"
    " and not exists (select from tailrace.held e where e.handler = h.handler and e.waits"
    "  and e.id < h.id and e.keys && h.keys)"
    " and not exists (select from tailrace.held e where e.handler = h.handler and e.waits"
    "  and e.id < h.id and e.keys = '{}')"
    " and (h.keys <> '{}' or not exists (select from tailrace.held e where e.handler = h.handler"
    "  and e.waits and e.id < h.id))"
    " order by id limit :most"
)
_KEYS = text(
    "select distinct k from tailrace.held h, unnest(h.keys) k"
    " where h.handler = :handler and h.waits and h.keys && cast(:keys as text[])"
    " union all select null where exists ("
    "  select from tailrace.held where handler = :handler and waits and keys = '{}')"
)
_ANY = text("select exists (select from tailrace.held where handler = :handler and waits)")
_INSERT = text(
    "insert into tailrace.held (handler, lanes, keys, lsn, ordinal, source, payload, changes, attempts,"
    " status, halts, next_attempt_at, error_class, error, traceback, hint, first_failed_at, last_failed_at)"
    " values (:handler, :lanes, :keys, :lsn, :ordinal, :source, :payload, :changes, :attempts, :status,"
    " :halts,"
    " clock_timestamp() + make_interval(secs => :delay), :error_class, :error, :traceback, :hint,"
    " case when :failed then clock_timestamp() end, case when :failed then clock_timestamp() end)"
)
_FAILED = text(
    "update tailrace.held set attempts = attempts + :attempts, status = :status, halts = :halts,"
    " next_attempt_at = clock_timestamp() + make_interval(secs => :delay), error_class = :error_class,"
    " error = :error, traceback = :traceback, hint = :hint, told_at = null,"
    " last_failed_at = clock_timestamp(),"
    " first_failed_at = coalesce(first_failed_at, clock_timestamp()) where id = :id"
)
_ABSORB = text(
    "with first as (select k as key, min(h.id) as id from tailrace.held h, unnest(h.keys) k"
    "  where h.handler = :handler and h.waits and h.keys && cast(:keys as text[])"
    "  and k = any(cast(:keys as text[])) group by k)"
    " update tailrace.held h set changes = h.changes + given.changes"
    " from unnest(cast(:keys as text[]), cast(:changes as integer[])) given (key, changes)"
    " join first using (key) where h.id = first.id"
)
_DELETE = text("delete from tailrace.held where id = any(cast(:ids as bigint[]))")
_PROMOTE = text(
    "update tailrace.held set next_attempt_at = clock_timestamp()"
    " where status = 'retrying' and next_attempt_at is null and id in ("
    # By what the keys have, never in the order of ids: most that waits may be of other keys.
    "  select min(h.id) from tailrace.held h, unnest(h.keys) k where h.handler = :handler and h.waits"
    "   and h.keys && cast(:keys as text[]) and k = any(cast(:keys as text[])) group by k"
    # The first of all may be one without keys. Where such a one has gone, the first of each key is free.
    "  union all select min(id) from tailrace.held where handler = :handler and waits"
    "  union all select min(h.id) from tailrace.held h, unnest(h.keys) k"
    "   where h.handler = :handler and h.waits and cardinality(cast(:keys as text[])) = 0 group by k)"
    " returning lanes[1]"
)
_UNTRIED = text(
    "select exists (select from tailrace.held where handler = :handler and lanes[1] = :lane"
    " and status = 'retrying' and attempts = 0 and next_attempt_at <= clock_timestamp())"
)
_BEHIND = text(
    "select exists (select from tailrace.held where handler = :handler"
    " and status = 'retrying' and next_attempt_at is null)"
)
_LANES = text(
    "select distinct h.handler, h.lanes[1] from tailrace.held h join tailrace.handlers on name = h.handler"
    " where h.status = 'retrying' and h.next_attempt_at <= clock_timestamp() and state = 'active'"
    " and not paused"
)


_NO_FAILURE = {
    "attempts": 0,
    "status": "retrying",
    "halts": False,
    "error_class": None,
    "error": None,
    "traceback": None,
    "hint": None,
}


async def due(session: AsyncSession, lane: Lane, seen: Sequence[int]) -> list[HeldRow]:
    """Read what this lane is to retry now, besides what it has seen; in the order of application."""
    connection = await session.connection()
    parameters = {"handler": lane.handler, "lane": lane.number, "most": MOST_AT_ONCE, "seen": list(seen)}
    found = await connection.execute(_DUE, parameters)
    return [from_row(row) for row in found]


def from_row(row: Sequence[Any]) -> HeldRow:
    """Make it of id, lanes, keys, lsn, ordinal, source, payload, changes, attempts, redriven and history."""
    keys = tuple(key.encode() for key in row[2])
    kept = Kept(tuple(row[1]), keys, Position(row[3], row[4]), row[5], row[6] or b"", row[7])
    return HeldRow(row[0], kept, row[8], row[9], row[10])


async def held_keys(session: AsyncSession, handler: str, keys: Sequence[bytes]) -> Blocked:
    """List the keys of all rows that wait with one of these keys."""
    connection = await session.connection()
    texts = [key.decode() for key in keys]
    found = [row[0] for row in await connection.execute(_KEYS, {"handler": handler, "keys": texts})]
    return Blocked((key.encode() for key in found if key is not None), everything=None in found)


async def any_waits(session: AsyncSession, handler: str) -> bool:
    """Tell whether any change of the handler waits."""
    connection = await session.connection()
    return bool((await connection.execute(_ANY, {"handler": handler})).scalar_one())


async def hold(
    session: AsyncSession,
    handler: str,
    changes: Sequence[tuple[Kept, Failure | None]],
    *,
    at_once: bool = False,
) -> None:
    """Hold changes, in their order: after a failure, or (without one) behind an earlier change of the key.

    Args:
        session: holds the locks of their lanes.
        handler: name of the handler.
        changes: what to keep of each, and the failure of its attempt, if there was one.
        at_once: those that have not failed wait behind nothing: due now.
    """
    if not changes:
        return
    connection = await session.connection()
    waits = _NO_FAILURE | {"delay": 0.0 if at_once else None}
    rows = [
        to_row(handler, kept)
        | {"failed": failure is not None}
        | (waits if failure is None else _told(failure))
        for kept, failure in changes
    ]
    await connection.execute(_INSERT, rows)


def to_row(handler: str, kept: Kept) -> dict[str, Any]:
    """Name what is kept of a change, as its row does; the reverse of `from_row`."""
    return {
        "handler": handler,
        "lanes": list(kept.lanes),
        "keys": [key.decode() for key in kept.keys],
        "lsn": kept.position.lsn,
        "ordinal": kept.position.ordinal,
        "source": kept.source,
        "payload": kept.payload,
        "changes": kept.changes,
    }


def _told(failure: Failure) -> dict[str, Any]:
    return {
        "attempts": 1 if failure.counts else 0,
        "status": "dead" if failure.delay is None else "retrying",
        "halts": failure.halts,
        "delay": failure.delay,
        "error_class": failure.error_class,
        "error": failure.error,
        "traceback": failure.traceback,
        "hint": failure.hint,
    }


async def absorb(session: AsyncSession, handler: str, counts: Mapping[bytes, int]) -> None:
    """Let held derive keys stand for further changes: their retries compute from what is there then."""
    if counts:
        connection = await session.connection()
        keys, changes = [key.decode() for key in counts], list(counts.values())
        await connection.execute(_ABSORB, {"handler": handler, "keys": keys, "changes": changes})


async def failed_again(session: AsyncSession, failed: Sequence[tuple[HeldRow, Failure]]) -> None:
    """Note that retries failed."""
    if failed:
        connection = await session.connection()
        await connection.execute(_FAILED, [{"id": row.id} | _told(failure) for row, failure in failed])


async def let_go(session: AsyncSession, rows: Sequence[HeldRow]) -> None:
    """Forget held changes: they are applied."""
    if rows:
        connection = await session.connection()
        await connection.execute(_DELETE, {"ids": [row.id for row in rows]})


async def promote(session: AsyncSession, handler: str, keys: Sequence[bytes]) -> set[int]:
    """Make the next rows of these keys due, after the first has gone; return the lanes that retry them."""
    connection = await session.connection()
    texts = [key.decode() for key in keys]
    return {row[0] for row in await connection.execute(_PROMOTE, {"handler": handler, "keys": texts})}


async def any_untried(session: AsyncSession, lane: Lane) -> bool:
    """Tell whether the lane has a row that is due and was never called."""
    connection = await session.connection()
    at = {"handler": lane.handler, "lane": lane.number}
    return bool((await connection.execute(_UNTRIED, at)).scalar_one())


async def any_behind(session: AsyncSession, handler: str) -> bool:
    """Tell whether any row of the handler waits behind another one."""
    connection = await session.connection()
    return bool((await connection.execute(_BEHIND, {"handler": handler})).scalar_one())


async def due_lanes(connection: AsyncConnection) -> list[Lane]:
    """List the lanes in which a retry is due."""
    return [Lane(row[0], row[1]) for row in await connection.execute(_LANES)]
