"""What a person decides about lanes: to pause a handler, or one lane key of it, and to let it go on.

A paused handler has a mark in its row: its lanes are parked. A paused lane key has a row of its own among the
held changes, with an id below all others: every change of the key waits behind it, as behind one that fails,
and it is never due. For a derive handler it counts the changes that it stands for, as any held key does.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker import audit, deciding, held
from worker.asked import Operator
from worker.audit import About
from worker.catalogue import Table, read_catalogue
from worker.change import Position
from worker.errors import Refused, Unknown
from worker.held import Kept
from worker.lanes import Lane
from worker.registry import Handler
from worker.routing import lane_of
from worker.typed import as_stored
from worker.values import canonicalizer

_HANDLER = text(
    "select name, kind, state, paused,"
    " (select count(*) from tailrace.held where handler = name and status = 'paused') as keys"
    " from tailrace.handlers where name = :handler"
)
_SET = text(
    "update tailrace.handlers set paused = :paused where name = :handler and paused <> :paused returning name"
)
_AT = text("select lsn, ordinal from tailrace.lanes where handler = :handler and lane = :lane")
_MARK = text(
    "select id, keys, changes, lanes, lsn, ordinal from tailrace.held"
    " where handler = :handler and status = 'paused' and keys @> array[cast(:key as text)]"
)
_PUT_MARK = text(
    "insert into tailrace.held (id, handler, lanes, keys, lsn, ordinal, source, changes, status)"
    " overriding system value"
    " values (-nextval(pg_get_serial_sequence('tailrace.held', 'id')), :handler,"
    " array[cast(:lane as integer)], array[cast(:key as text)], :lsn, :ordinal, 'pause', 0, 'paused')"
)
# They are behind the mark now, and would be found due for ever.
_NOT_DUE = text(
    "update tailrace.held set next_attempt_at = null where handler = :handler and status = 'retrying'"
    " and keys @> array[cast(:key as text)]"
)
_DELETE = text("delete from tailrace.held where id = :id")
_PAUSED_KEYS = text(
    "select handler, keys[1] from tailrace.held where status = 'paused'"
    " and (cast(:handler as text) is null or handler = :handler) order by handler, keys"
)
_HANDLERS = text(
    "select h.name, h.kind, h.state, h.paused, count(l.lane) as lanes,"
    " coalesce(sum(l.read), 0)::bigint as read, coalesce(sum(l.applied), 0)::bigint as applied,"
    " max(l.moved_at) as moved_at"
    " from tailrace.handlers h left join tailrace.lanes l on l.handler = h.name"
    " where cast(:handler as text) is null or h.name = :handler group by h.name order by h.name"
)
_WAITING = text(
    "select handler, coalesce(sum(changes) filter (where status = 'retrying'), 0)::bigint,"
    " coalesce(sum(changes) filter (where status in ('parked', 'paused')), 0)::bigint,"
    " coalesce(sum(changes) filter (where status = 'dead'), 0)::bigint"
    " from tailrace.held group by handler"
)


class Paused(NamedTuple):
    """What came of it."""

    told: dict[str, Any]
    wake: set[Lane]
    """Lanes that can go on now."""


async def pause(engine: AsyncEngine, operator: Operator, handler: str) -> Paused:
    """Pause a handler: calls that have begun end, no other begins, and its changes are parked.

    Raises:
        Unknown: there is no such handler.
    """
    return await _set(engine, operator, handler, paused=True)


async def resume(engine: AsyncEngine, operator: Operator, handler: str) -> Paused:
    """Let a handler go on; lane keys that were paused by themselves stay so.

    Raises:
        Unknown: there is no such handler.
    """
    return await _set(engine, operator, handler, paused=False)


async def _set(engine: AsyncEngine, operator: Operator, handler: str, *, paused: bool) -> Paused:
    async with engine.begin() as connection:
        changed = (await connection.execute(_SET, {"handler": handler, "paused": paused})).one_or_none()
        row = await _handler(connection, handler)
        if changed is not None:
            await audit.note(connection, operator, "pause" if paused else "resume", [About(handler)])
        count = await deciding.count_lanes(connection)
    told = {
        "handler": handler,
        "lane_key": None,
        "paused": paused,
        "changed": changed is not None,
        "paused_keys": row.keys_,
    }
    return Paused(told, set() if paused else {Lane(handler, number) for number in range(count)})


class _Row(NamedTuple):
    kind: str
    state: str
    paused: bool
    keys_: int


async def _handler(connection: AsyncConnection, handler: str) -> _Row:
    row = (await connection.execute(_HANDLER, {"handler": handler})).one_or_none()
    if row is None:
        raise Unknown(f"there is no handler {handler}")
    return _Row(*row[1:])


# One lane key


async def pause_key(engine: AsyncEngine, operator: Operator, handler: str, key: bytes) -> Paused:
    """Let all changes of a lane key wait, in Postgres and in their order, until it is resumed.

    Args:
        engine: of the database.
        operator: who wants it.
        handler: its name.
        key: as `read_key` gives it.

    Raises:
        Unknown: there is no such handler.
    """

    async def act(session: AsyncSession, lane: int) -> Paused:
        connection = await session.connection()
        about = {"handler": handler, "lane": lane, "key": key.decode()}
        changed = (await connection.execute(_MARK, about)).one_or_none() is None
        if changed:
            at = (await connection.execute(_AT, about)).one()
            await connection.execute(_PUT_MARK, about | {"lsn": at[0], "ordinal": at[1]})
            await connection.execute(_NOT_DUE, about)
            await deciding.count_holding(connection, handler, {lane: 1})
            await audit.note(connection, operator, "pause", [About(handler, lane_key=key)])
        return _told_of_key(handler, key, paused=True, changed=changed)

    return await _with_lane(engine, handler, key, act)


async def resume_key(engine: AsyncEngine, operator: Operator, handler: str, key: bytes) -> Paused:
    """Let a lane key go on, with what has waited first.

    Raises:
        Unknown: there is no such handler, or the key is not paused.
    """

    async def act(session: AsyncSession, lane: int) -> Paused:
        connection = await session.connection()
        about = {"handler": handler, "lane": lane, "key": key.decode()}
        mark = (await connection.execute(_MARK, about)).one_or_none()
        if mark is None:
            raise Unknown(f"lane key {key.decode()} of {handler} is not paused")
        await connection.execute(_DELETE, {"id": mark.id})
        await deciding.count_holding(connection, handler, {lane: -1})
        wake = {lane}
        if (await _handler(connection, handler)).kind == "derive":
            # It stood for what came meanwhile: also for a backfill, which counts no changes.
            if (await held.held_keys(session, handler, [key])).keys:
                await held.absorb(session, handler, {key: mark.changes})
            else:
                at = Position(mark.lsn, mark.ordinal)
                kept = Kept((lane,), (key,), at, "key", b"", mark.changes)
                await held.hold(session, handler, [(kept, None)], at_once=True)
                await deciding.count_holding(connection, handler, {lane: 1})
        wake |= await held.promote(session, handler, [key])
        await audit.note(connection, operator, "resume", [About(handler, lane_key=key)])
        told = _told_of_key(handler, key, paused=False, changed=True)
        return told._replace(wake={Lane(handler, number) for number in wake})

    return await _with_lane(engine, handler, key, act)


def _told_of_key(handler: str, key: bytes, *, paused: bool, changed: bool) -> Paused:
    told = {"handler": handler, "lane_key": key.decode(), "paused": paused, "changed": changed}
    return Paused(told, set())


async def _with_lane(
    engine: AsyncEngine, handler: str, key: bytes, act: Callable[[AsyncSession, int], Awaitable[Paused]]
) -> Paused:
    """Do it under the lock of the key's lane."""

    async def step(session: AsyncSession) -> Paused:
        connection = await session.connection()
        await _handler(connection, handler)
        count = await deciding.count_lanes(connection)
        lane = lane_of(handler, key, max(1, count))
        if not await deciding.lock_lanes(connection, handler, (lane,)):
            raise Refused(f"handler {handler} has no lanes: no listener has run since it was made")
        await deciding.keep_count(connection, count)
        return await act(session, lane)

    return await deciding.in_one_transaction(engine, step, about=handler)


async def read_key(engine: AsyncEngine, handlers: Sequence[Handler], name: str, given: str) -> bytes:
    """Make the lane key of what a person typed: a value, or a JSON array of the key's values.

    Raises:
        Unknown: there is no such handler.
        Refused: it is no key of that handler.
    """
    handler = next((one for one in handlers if one.name == name), None)
    async with engine.connect() as connection:
        if handler is None:
            await _handler(connection, name)
            raise Refused(f"handler {name} is not loaded here: what its lane keys are is not known")
        texts = _texts(given)
        wanted = {(one.schema, one.table) for one in handler.subscriptions}
        catalogue = await read_catalogue(connection, "", wanted)
        keys: dict[bytes, None] = {}
        shapes: list[str] = []
        for columns, prefix, table in _shapes(handler, catalogue.tables):
            shapes.append(f"({', '.join([*map(str, prefix), *columns])})")
            if len(texts) == len(prefix) + len(columns) and texts[: len(prefix)] == prefix:
                values = texts[len(prefix) :]
            elif len(texts) == len(columns):
                values = texts
            else:
                continue
            keys[await _canonical(connection, table, columns, prefix, values)] = None
    if len(keys) == 1:
        return next(iter(keys))
    said = "is not one" if not keys else "may be several"
    raise Refused(
        f"{given} {said} of the lane keys of {name}, which are {' or '.join(dict.fromkeys(shapes))}: give"
        " it as a JSON array of texts, as `dead-letters show` does"
    )


def _texts(given: str) -> list[str | None]:
    try:
        found = msgspec.json.decode(given)
    except msgspec.DecodeError:
        return [given]
    if not isinstance(found, list):
        return [given]
    return [None if one is None else one if isinstance(one, str) else str(one) for one in found]


def _shapes(
    handler: Handler, tables: Mapping[tuple[str, str], Table]
) -> list[tuple[tuple[str, ...], list[str | None], Table]]:
    """List columns and prefix of the lane keys of each subscription; as matching.py makes them."""
    found = []
    for one in handler.subscriptions:
        table = tables.get((one.schema, one.table))
        if table is None:
            continue
        columns = one.lane_key or table.primary_key
        prefix: list[str | None] = (
            [one.qualified] if one.lane_key is None and handler.kind != "derive" else []
        )
        found.append((columns, prefix, table))
    return found


async def _canonical(
    connection: AsyncConnection,
    table: Table,
    columns: Sequence[str],
    prefix: Sequence[str | None],
    values: Sequence[str | None],
) -> bytes:
    texts = list(prefix)
    for name, value in zip(columns, values, strict=True):
        column = table.columns[name]
        stored = None if value is None else (await as_stored(connection, column, value)).encode()
        texts.append(canonicalizer(column.value_type, "text")(stored))
    return msgspec.json.encode(texts)


async def list_lanes(engine: AsyncEngine, handler: str | None = None) -> list[dict[str, Any]]:
    """Tell of each handler whether it, or which lane keys of it, are paused, and what waits.

    Raises:
        Unknown: there is no such handler.
    """
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ")
        rows = (await connection.execute(_HANDLERS, {"handler": handler})).mappings().all()
        if handler is not None and not rows:
            raise Unknown(f"there is no handler {handler}")
        waiting = {row[0]: row[1:] for row in await connection.execute(_WAITING)}
        keys: dict[str, list[str]] = {}
        for name, key in await connection.execute(_PAUSED_KEYS, {"handler": handler}):
            keys.setdefault(name, []).append(key)
    found = []
    for row in rows:
        held_, parked, dead = waiting.get(row["name"], (0, 0, 0))
        counts = {"held": held_, "parked": parked, "dead": dead}
        told = {"handler": row["name"], **{name: row[name] for name in row if name != "name"}}
        found.append(told | counts | {"paused_keys": keys.get(row["name"], [])})
    return found
