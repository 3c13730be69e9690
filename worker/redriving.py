"""What a person decides about a dead letter: to try it again, perhaps with another record, or to discard it.

One transaction each, under the locks of the change's lanes (see deciding.py): counters stay true, nothing is
applied twice. A redriven change is tried after newer changes of its key may have been applied: that is what
the person asked for.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker import audit, deciding, edits, held, overtaking
from worker.asked import Operator, Which
from worker.audit import About
from worker.catalogue import read_catalogue
from worker.change import RawSource
from worker.dead_letters import DeadLetter, find, unknown
from worker.errors import Refused
from worker.lanes import Lane
from worker.registry import Handler
from worker.routing import lane_of
from worker.typed import as_stored

_STATE = text("select state from tailrace.handlers where name = :handler")
_TAKE_HANDLER = text("select name from tailrace.handlers where name = :handler for no key update nowait")
_TAKE = text("select id from tailrace.held where id = :id and status = 'dead' for update")
_REDRIVE = text(
    "update tailrace.held d set status = 'retrying', halts = false, attempts = 0, redriven = true,"
    " told_at = null, lanes = :lanes, payload = :payload,"
    # Behind another one it is made due when that has gone, as every held change is.
    " next_attempt_at = case when not exists (select from tailrace.held e where e.handler = d.handler"
    "  and e.waits and e.id < d.id and (e.keys && d.keys or e.keys = '{}' or d.keys = '{}'))"
    "  then clock_timestamp() end where id = :id"
)
_DELETE = text("delete from tailrace.held where id = :id")
_UNREAD = text("update tailrace.lanes set read = read - :changes where handler = :handler and lane = :lane")
_FILTERED = text("update tailrace.handlers set filtered = filtered + :changes where name = :handler")


class Decided(NamedTuple):
    """What came of it."""

    told: dict[str, Any]
    wake: set[Lane]
    """Lanes that can go on now."""


class Edit(NamedTuple):
    """Other values for columns of the record."""

    values: Mapping[str, Any]
    """Column -> value, as JSON has it."""
    handlers: Sequence[Handler]
    """All that are loaded: what decides a lane key must not be edited."""


async def redrive(engine: AsyncEngine, operator: Operator, id_: int, edit: Edit | None = None) -> Decided:
    """Have a dead letter tried again, from its first attempt on.

    Raises:
        Unknown: there is no dead letter of this id.
        Refused: nobody would apply it, or the edit does not fit.
    """

    async def act(session: AsyncSession, letter: DeadLetter) -> Decided:
        connection = await session.connection()
        count = await deciding.count_lanes(connection)
        lanes = _lanes_among(count, letter)
        if (await connection.execute(_STATE, {"handler": letter.handler})).scalar_one() != "active":
            raise Refused(
                f"handler {letter.handler} is not loaded any more: nobody would apply dead letter {id_};"
                " bring it back, or discard it"
            )
        letter, there = await _lock(connection, letter, lanes)
        await deciding.keep_count(connection, count)
        if there != set(lanes):
            raise deciding.LanesChangedError
        payload, details = letter.payload, None
        if edit is not None:
            edited, stored = await _edited(connection, letter, edit)
            payload, details = edited.payload, {"before": edited.before, "after": stored}
        newer = await overtaking.told(connection, letter.id)
        await overtaking.hand_down(connection, letter.id)
        changed = {"id": letter.id, "lanes": lanes, "payload": payload}
        await connection.execute(_REDRIVE, changed)
        if not letter.halts:  # one that halts is counted already
            await deciding.count_holding(connection, letter.handler, lanes, 1)
        await audit.note(connection, operator, "redrive", About(letter.handler, letter.id), details)
        return Decided(
            letter.told() | {"status": "retrying", "attempts": 0, "newer": newer},
            {Lane(letter.handler, lanes[0])},
        )

    return await _decide(engine, id_, act)


async def discard(engine: AsyncEngine, operator: Operator, id_: int) -> Decided:
    """Forget a dead letter: its changes count as filtered out from now on, for a person left them out.

    Raises:
        Unknown: there is no dead letter of this id.
    """

    async def act(session: AsyncSession, letter: DeadLetter) -> Decided:
        connection = await session.connection()
        letter, there = await _lock(connection, letter, letter.lanes)
        about = {"handler": letter.handler, "changes": letter.changes}
        await connection.execute(_TAKE_HANDLER, about)
        await overtaking.hand_down(connection, letter.id)
        await connection.execute(_DELETE, {"id": letter.id})
        # Which lane had counted it is all the same where lanes have gone since: they are added up.
        lane = letter.lanes[0] if letter.lanes[0] in there else 0
        await connection.execute(_UNREAD, about | {"lane": lane})
        await connection.execute(_FILTERED, about)
        wake: set[Lane] = set()
        if letter.halts:
            await deciding.count_holding(connection, letter.handler, letter.lanes, -1)
            keys = [key.encode() for key in letter.keys]
            wake = {Lane(letter.handler, n) for n in await held.promote(session, letter.handler, keys)}
        told = letter.told()
        kept = {name: told[name] for name in ("schema", "table", "type", "key", "position", "error_class")}
        await audit.note(connection, operator, "discard", About(letter.handler, letter.id), kept)
        return Decided(told | {"status": "discarded"}, wake)

    return await _decide(engine, id_, act)


async def _decide(
    engine: AsyncEngine, id_: int, act: Callable[[AsyncSession, DeadLetter], Awaitable[Decided]]
) -> Decided:
    async def step(session: AsyncSession) -> Decided:
        found = await find(await session.connection(), Which(ids=(id_,)))
        if not found:
            raise unknown([id_])
        return await act(session, found[0])

    return await deciding.in_one_transaction(engine, step, about=f"dead letter {id_}")


async def _lock(
    connection: AsyncConnection, letter: DeadLetter, lanes: Sequence[int]
) -> tuple[DeadLetter, set[int]]:
    """Take the rows of the lanes, then the dead letter; return it as it is now, and the lanes there are."""
    there = await deciding.lock_lanes(connection, letter.handler, lanes)
    await connection.execute(_TAKE, {"id": letter.id})
    found = await find(connection, Which(ids=(letter.id,)))
    if not found:
        raise unknown([letter.id])
    return found[0], there


def _lanes_among(count: int, letter: DeadLetter) -> list[int]:
    """Work out the lanes of a change: there may be another number of them than when it died."""
    if not letter.keys:  # a TRUNCATE concerns every key
        return list(range(count))
    return sorted({lane_of(letter.handler, key.encode(), max(1, count)) for key in letter.keys})


# Edits


async def _edited(
    connection: AsyncConnection, letter: DeadLetter, edit: Edit
) -> tuple[edits.Edited, dict[str, str | None]]:
    raw = letter.raw
    if raw is None:
        what = "a derive handler is given keys" if letter.source == "key" else "its payload cannot be read"
        raise Refused(f"dead letter {letter.id} has no record to edit: {what}")
    if not edit.values:
        raise Refused("the edited record names no column")
    columns = edits.columns_of(raw, edit.values)
    catalogue = await read_catalogue(connection, "", [(raw.schema, raw.table)])
    table = catalogue.tables.get((raw.schema, raw.table))
    if table is None:
        raise Refused(f"{raw.schema}.{raw.table} does not exist any more")
    deciding = _deciding(letter, edit.handlers, (raw.schema, raw.table)) or set(table.primary_key)
    if wrong := sorted(deciding & edit.values.keys()):
        raise Refused(
            f'"{wrong[0]}" decides the lane key of the change, and with it its place: it must stay as it is'
        )
    stored: dict[str, str | None] = {}
    for name, column in columns.items():
        given = edits.as_text(column, edit.values[name])
        if name not in table.columns:
            raise Refused(f'{raw.schema}.{raw.table} has no column "{name}" any more')
        stored[name] = None if given is None else await as_stored(connection, table.columns[name], given)
    source: RawSource = raw.source
    return edits.edit(source, letter.payload, edit.values, stored), stored


def _deciding(letter: DeadLetter, handlers: Sequence[Handler], table: tuple[str, str]) -> set[str]:
    """Name the columns by which the handler orders changes of a table, where it names any."""
    handler = next((one for one in handlers if one.name == letter.handler), None)
    if handler is None:
        raise Refused(f"handler {letter.handler} is not loaded here: what decides its order is not known")
    return {
        column
        for one in handler.subscriptions
        if (one.schema, one.table) == table
        for column in one.lane_key or ()
    }
