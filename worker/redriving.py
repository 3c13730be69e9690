"""What a person decides about a dead letter: to try it again, perhaps with another record, or to discard it.

One transaction each, under the locks of the change's lanes (see deciding.py): counters stay true, nothing is
applied twice. A redriven change is tried after newer changes of its key may have been applied: that is what
the person asked for.
"""

from collections import Counter
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

MOST_OF_ONE = 500
"""Dead letters of one lane that are decided about in one transaction."""
MOST_OF_SEVERAL = 25
_ANY = -1

_STATE = text("select state from tailrace.handlers where name = :handler")
_TAKE_HANDLER = text("select name from tailrace.handlers where name = :handler for no key update nowait")
_TAKE = text(
    "select id from tailrace.held where id = any(cast(:ids as bigint[])) and status = 'dead'"
    " order by id for update"
)
_REDRIVE = text(
    f"with handed_down as ({overtaking.HAND_DOWN})"  # noqa: S608 - made of constants
    " update tailrace.held d set status = 'retrying', halts = false, attempts = 0, redriven = true,"
    " told_at = null, lanes = :lanes, payload = :payload,"
    # Behind another one it is made due when that has gone, as every held change is.
    " next_attempt_at = case when not exists (select from tailrace.held e where e.handler = d.handler"
    "  and e.waits and e.id < d.id and (e.keys && d.keys or e.keys = '{}' or d.keys = '{}'))"
    "  then clock_timestamp() end where id = :id"
)
# Of one lane, as they are, and with nothing noted at them: all at once.
_REDRIVE_PLAIN = text(
    "update tailrace.held d set status = 'retrying', halts = false, attempts = 0, redriven = true,"
    " told_at = null, lanes = :lanes,"
    " next_attempt_at = case when given.first and not exists (select from tailrace.held e"
    "  where e.handler = d.handler and e.waits and e.id < d.id and (e.keys && d.keys or e.keys = '{}'))"
    "  then clock_timestamp() end"
    " from unnest(cast(:ids as bigint[]), cast(:first as boolean[])) given (id, first) where d.id = given.id"
)
_DELETE = text("delete from tailrace.held where id = any(cast(:ids as bigint[]))")
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
    (done,) = await redrive_together(engine, operator, [id_], edit)
    return done


async def redrive_together(
    engine: AsyncEngine, operator: Operator, ids: Sequence[int], edit: Edit | None = None
) -> list[Decided]:
    """Have dead letters of one handler tried again, in one transaction and in the order of their ids.

    All their lanes are locked until it ends: those of a few, or of one lane.

    Args:
        engine: of the database.
        operator: who wants it.
        ids: of them.
        edit: other values, for the only one.

    Raises:
        Unknown: one of them is no dead letter, or no longer; nothing was done.
        Refused: nobody would apply them, or the edit does not fit; nothing was done.
    """

    async def act(session: AsyncSession, letters: list[DeadLetter]) -> list[Decided]:
        connection = await session.connection()
        handler = letters[0].handler
        count = await deciding.count_lanes(connection)
        lanes = {letter.id: _lanes_among(count, letter) for letter in letters}
        if (await connection.execute(_STATE, {"handler": handler})).scalar_one() != "active":
            raise Refused(
                f"handler {handler} is not loaded any more: nobody would apply dead letter {letters[0].id};"
                " bring it back, or discard it"
            )
        concerned = sorted(set().union(*lanes.values()))
        letters, there = await _lock(connection, letters, concerned)
        await deciding.keep_count(connection, count)
        if there != set(concerned):
            raise deciding.LanesChangedError
        payloads, details = {letter.id: letter.payload for letter in letters}, None
        if edit is not None:
            edited, stored = await _edited(connection, letters[0], edit)
            payloads[letters[0].id] = edited.payload
            details = {"before": edited.before, "after": stored}
        newer = await overtaking.told(connection, [letter.id for letter in letters])
        plain = _plain(letters, lanes) if edit is None else {}
        if plain:
            given = {"ids": list(plain), "first": list(plain.values()), "lanes": concerned}
            await connection.execute(_REDRIVE_PLAIN, given)
        # Each in its turn: what is noted at one is handed to those before it that are still dead then.
        if others := [one for one in letters if one.id not in plain]:
            await connection.execute(
                _REDRIVE,
                [{"id": one.id, "lanes": lanes[one.id], "payload": payloads[one.id]} for one in others],
            )
        # One that halts is counted already.
        holding = Counter(lane for one in letters if not one.halts for lane in lanes[one.id])
        await deciding.count_holding(connection, handler, holding)
        abouts = [About(handler, letter.id, details=details) for letter in letters]
        await audit.note(connection, operator, "redrive", abouts)
        return [
            Decided(
                letter.told() | {"status": "retrying", "attempts": 0, "newer": newer[letter.id]},
                {Lane(handler, lanes[letter.id][0])},
            )
            for letter in letters
        ]

    return await _decide(engine, ids, act)


def _plain(letters: Sequence[DeadLetter], lanes: Mapping[int, Sequence[int]]) -> dict[int, bool]:
    """Choose those that can be redriven at once; tell of each whether it is the first of its keys."""
    if len({lane for one in letters for lane in lanes[one.id]}) > 1 or not all(one.keys for one in letters):
        return {}
    plain, known = dict[int, bool](), set[str]()
    for one in letters:
        if not one.overtaken:
            plain[one.id] = known.isdisjoint(one.keys)
        known.update(one.keys)
    return plain


async def discard(engine: AsyncEngine, operator: Operator, id_: int) -> Decided:
    """Forget a dead letter: its changes count as filtered out from now on, for a person left them out.

    Raises:
        Unknown: there is no dead letter of this id.
    """
    (done,) = await discard_together(engine, operator, [id_])
    return done


async def discard_together(engine: AsyncEngine, operator: Operator, ids: Sequence[int]) -> list[Decided]:
    """Forget dead letters of one handler, in one transaction; locks as `redrive_together` does.

    Raises:
        Unknown: one of them is no dead letter, or no longer; nothing was done.
    """

    async def act(session: AsyncSession, letters: list[DeadLetter]) -> list[Decided]:
        connection = await session.connection()
        handler = letters[0].handler
        letters, there = await _lock(connection, letters, sorted({n for one in letters for n in one.lanes}))
        await connection.execute(_TAKE_HANDLER, {"handler": handler})
        # From the last to the first: what is handed to one that goes, too, is handed on.
        for letter in reversed(letters):
            if letter.overtaken:
                await overtaking.hand_down(connection, letter.id)
        await connection.execute(_DELETE, {"ids": [letter.id for letter in letters]})
        # Which lane had counted it is all the same where lanes have gone since: they are added up.
        changes = Counter[int]()
        for one in letters:
            changes[one.lanes[0] if one.lanes[0] in there else 0] += one.changes
        await connection.execute(
            _UNREAD, [{"handler": handler, "lane": lane, "changes": n} for lane, n in sorted(changes.items())]
        )
        await connection.execute(_FILTERED, {"handler": handler, "changes": changes.total()})
        wake = set[Lane]()
        if halted := [one for one in letters if one.halts]:
            holding = Counter(lane for one in halted for lane in one.lanes)
            await deciding.count_holding(connection, handler, {lane: -n for lane, n in holding.items()})
            keys = sorted({key.encode() for one in halted for key in one.keys})
            freed = await held.promote(session, handler, keys) if keys else set()
            if any(not one.keys for one in halted):  # it held back all keys
                freed |= await held.promote(session, handler, ())
            wake = {Lane(handler, number) for number in freed}
        told = [letter.told() for letter in letters]
        kept = ("schema", "table", "type", "key", "position", "error_class")
        abouts = [
            About(handler, letter.id, details={name: one[name] for name in kept})
            for letter, one in zip(letters, told, strict=True)
        ]
        await audit.note(connection, operator, "discard", abouts)
        return [Decided(one | {"status": "discarded"}, wake) for one in told]

    return await _decide(engine, ids, act)


async def _decide(
    engine: AsyncEngine,
    ids: Sequence[int],
    act: Callable[[AsyncSession, list[DeadLetter]], Awaitable[list[Decided]]],
) -> list[Decided]:
    async def step(session: AsyncSession) -> list[Decided]:
        return await act(session, await _found(await session.connection(), ids))

    about = f"dead letter {ids[0]}" if len(ids) == 1 else f"dead letters {ids[0]} to {ids[-1]}"
    return await deciding.in_one_transaction(engine, step, about=about)


async def _found(connection: AsyncConnection, ids: Sequence[int]) -> list[DeadLetter]:
    found = await find(connection, Which(ids=tuple(ids)))
    if missing := sorted(set(ids) - {one.id for one in found}):
        raise unknown(missing)
    return found


async def _lock(
    connection: AsyncConnection, letters: Sequence[DeadLetter], lanes: Sequence[int]
) -> tuple[list[DeadLetter], set[int]]:
    """Take the rows of the lanes, then the dead letters; return these as they are now, and what lanes are."""
    there = await deciding.lock_lanes(connection, letters[0].handler, lanes)
    ids = [letter.id for letter in letters]
    await connection.execute(_TAKE, {"ids": ids})
    return await _found(connection, ids), there


async def grouped(connection: AsyncConnection, letters: Sequence[DeadLetter]) -> list[list[DeadLetter]]:
    """Put dead letters into groups to be decided about together, so that those of each key keep their order.

    By their lane, so that no more than one is locked at a time; but where one of a handler has several lanes,
    its letters are taken a few at a time, in the order of their ids.
    """
    count = await deciding.count_lanes(connection)
    lanes = {letter.id: _lanes_among(count, letter) for letter in letters}
    several = {letter.handler for letter in letters if len(lanes[letter.id]) > 1}
    by_lane: dict[tuple[str, int], list[DeadLetter]] = {}
    for letter in letters:
        number = _ANY if letter.handler in several else lanes[letter.id][0]
        by_lane.setdefault((letter.handler, number), []).append(letter)
    return [
        group[start : start + most]
        for (_, number), group in by_lane.items()
        for most in (MOST_OF_SEVERAL if number == _ANY else MOST_OF_ONE,)
        for start in range(0, len(group), most)
    ]


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
