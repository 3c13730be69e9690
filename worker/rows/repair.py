"""Raw changes to typed ones: decoding, and reading again what the wire left out.

Python decodes what it can without a statement, which for most tables is everything. At most two statements
serve a batch otherwise: one in which Postgres reads the types that Python does not, one that reads columns
again by primary key. What is read again is the row of today; a row that is gone leaves its columns missing,
never guessed. Routing was done before, and never on such values.
"""

import datetime as dt
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from worker.catalogue import Table
from worker.change import Change, LogChange, Position, RawChange, Record
from worker.raw import Outline
from worker.rows.reread import read_again
from worker.rows.shape import Absent, Shape, shape_of
from worker.values.database import decode_by_database
from worker.values.scalars import Value

Entry = tuple[Position, RawChange, int]

_NULL: Final = b"null"
_NOTHING: Final[frozenset[str]] = frozenset()
_ALL_THERE: Final = Absent({}, _NOTHING)

_CUT: Final = (
    "Realtime sends only the first character of char(n) and bit(n), and old values cannot be read again"
)
_NAN: Final = "Realtime sends NaN and infinities as null, and old values cannot be read again"
_TOO_LARGE: Final = "the row is too large for Realtime (error 413), and old values cannot be read again"
_NO_KEY: Final = "the source left it out, and the primary key by which to read it again as well"
_DROPPED: Final = "the source left it out, and the column no longer exists"


async def build_changes(
    session: AsyncSession, tables: Sequence[Table], entries: Sequence[Entry]
) -> list[Change]:
    """Make the changes that handlers see, of raw changes of one table.

    Args:
        session: in a transaction; used only where Python alone cannot do it, under savepoints. It must be
            allowed to read the table.
        tables: the table as the catalogue has it now, and as it was before, newest first; not empty.
        entries: (position, raw change, attempt from 1) each.

    Returns:
        The changes, in the order of the entries. Values in `repaired` are as of now.

    Raises:
        sqlalchemy.exc.DBAPIError: the database is away, or SELECT on the table is not granted.
    """
    changes: list[Change | None] = []
    drafts: list[tuple[int, _Draft]] = []
    shapes: dict[Any, Shape] = {}
    table = tables[0]
    columns, shape = None, None
    for position, raw, attempt in entries:
        if shape is None or raw.columns is not columns:
            columns = raw.columns
            known = shapes.get((raw.source, columns))
            if known is None:
                known = shapes[raw.source, columns] = shape_of(tables, columns, raw.source)
            shape = known
        change = _at_once(table, shape, position, raw, attempt)
        if change is None:
            drafts.append((len(changes), _draft(table, shape, position, raw, attempt)))
        changes.append(change)
    if drafts:
        await _complete(session, table, [draft for _, draft in drafts])
        for at, draft in drafts:
            changes[at] = draft.change()
    return [change for change in changes if change is not None]


def _at_once(table: Table, shape: Shape, position: Position, raw: RawChange, attempt: int) -> Change | None:
    """Make the change without the database, or give None where that cannot be."""
    if not shape.plain:
        return None
    new: Record | None = None
    old: Record | None = None
    if raw.record is not None:
        if len(raw.record) != len(shape.names):
            return None
        values = shape.read(raw.record)
        for name in shape.nan:
            if values[name] is None:
                return None
        new = Record(values)
    if raw.old_record is not None:
        values = shape.read(raw.old_record)
        for name in shape.certainly_nan:
            if values.get(name, 0) is None:
                return None
        old = Record(values, absent_from_old(table, shape, raw, values).reasons)
    missing = _NOTHING
    if raw.type == "DELETE" and old is not None:
        missing = absent_from_old(table, shape, raw, old).columns
    return _change(shape, position, raw, attempt, new, old, missing=missing)


def _change(  # noqa: PLR0913 - the parts of a change
    shape: Shape,
    position: Position,
    raw: RawChange,
    attempt: int,
    new: Record | None,
    old: Record | None,
    *,
    missing: frozenset[str] = _NOTHING,
    repaired: frozenset[str] = _NOTHING,
    unchanged: frozenset[str] = _NOTHING,
) -> Change:
    return Change(
        position=position,
        schema=raw.schema,
        table=raw.table,
        type=raw.type,
        record=new,
        old_record=old,
        key=shape.key_of(old if new is None else new),
        commit_timestamp=_moment(raw.commit_timestamp),
        source="backfill" if raw.backfill else raw.source,
        attempt=attempt,
        repaired=repaired,
        missing=missing,
        unchanged=unchanged,
    )


def _moment(text: str | None) -> dt.datetime | None:
    return None if text is None else dt.datetime.fromisoformat(text)


def _is_too_large(raw: RawChange | Outline | LogChange) -> bool:
    return not isinstance(raw, LogChange) and any("413" in error for error in raw.errors or ())


def absent_from_old(
    table: Table, shape: Shape, raw: RawChange | Outline | LogChange, old: Mapping[str, Any]
) -> Absent:
    """Name the columns that the old row of a change does not have, with the reason."""
    if len(old) == len(shape.names):
        return _ALL_THERE
    if _is_too_large(raw):
        return shape.absent(old, _TOO_LARGE)
    if raw.type == "DELETE" and not shape.of_log and table.row_security and table.identity == "full":
        reason = (
            f"Realtime sends only the key of a row deleted from {table.sql_name}: it has row-level security"
        )
    else:
        reason = (
            f"the replica identity of {table.sql_name} does not carry its old value; "
            f"ALTER TABLE {table.sql_name} REPLICA IDENTITY FULL makes it come"
        )
    return shape.absent(old, reason)


@dataclass(slots=True)
class _Draft:
    """A change that waits for the database."""

    position: Position
    raw: RawChange
    attempt: int
    shape: Shape
    new: dict[str, Any] | None = None
    old: dict[str, Any] | None = None
    missing: dict[str, str] = field(default_factory=dict)
    old_missing: dict[str, str] = field(default_factory=dict)
    repaired: set[str] = field(default_factory=set)
    unchanged: frozenset[str] = _NOTHING
    again: set[str] = field(default_factory=set)
    key: dict[str, bytes] | None = None

    def change(self) -> Change:
        new = None if self.new is None else Record(self.new, self.missing)
        old = None if self.old is None else Record(self.old, self.old_missing)
        missing = self.old_missing if self.new is None else self.missing
        return _change(
            self.shape,
            self.position,
            self.raw,
            self.attempt,
            new,
            old,
            missing=frozenset(missing),
            repaired=frozenset(self.repaired),
            unchanged=self.unchanged,
        )


def _draft(table: Table, shape: Shape, position: Position, raw: RawChange, attempt: int) -> _Draft:
    draft = _Draft(position, raw, attempt, shape)
    if raw.record is not None:
        draft.new = new = shape.read(raw.record)
        absent = shape.names.difference(raw.record)
        cut = {name for name in shape.cut if new.pop(name, None) is not None} if shape.cut else _NOTHING
        draft.again = {*absent, *cut, *(name for name in shape.nan if name in new and new[name] is None)}
        new.update((name, None) for name in shape.cut if name in raw.record and name not in cut)
        if raw.type == "UPDATE" and not _is_too_large(raw):
            draft.unchanged = frozenset(absent)
        draft.key = _key(shape, raw.record)
    if raw.old_record is not None:
        draft.old = old = shape.read(raw.old_record)
        draft.old_missing = dict(absent_from_old(table, shape, raw, raw.old_record).reasons)
        hidden = {name: _CUT for name in shape.cut if old.get(name) is not None}
        hidden |= {name: _NAN for name in shape.certainly_nan if old.get(name, 0) is None}
        for name in hidden:
            del old[name]
        draft.old_missing |= hidden
    return draft


def _key(shape: Shape, row: Mapping[str, Any]) -> dict[str, bytes] | None:
    """Take the primary key as it came, if all of it came whole."""
    if not shape.rereads:
        return None
    carried = [name for name in shape.key if row.get(name) is not None and name not in shape.cut]
    key = {name: _as_json(shape, row[name]) for name in carried}
    return key if shape.key and len(key) == len(shape.key) and _NULL not in key.values() else None


def _as_json(shape: Shape, value: Any) -> bytes:  # noqa: ANN401 - msgspec.Raw, or bytes of the log
    """Write a value as JSON: of the log as a string, which Postgres reads as any type."""
    return msgspec.json.encode(str(value, "utf-8")) if shape.of_log else bytes(value)


async def _complete(session: AsyncSession, table: Table, drafts: Sequence[_Draft]) -> None:
    by_shape: dict[int, list[_Draft]] = {}
    for draft in drafts:
        if draft.shape.casts:
            by_shape.setdefault(id(draft.shape), []).append(draft)
    for group in by_shape.values():
        await _read_by_database(session, group[0].shape, group)
    open_drafts = [draft for draft in drafts if draft.again]
    keyed = [(draft, draft.key) for draft in open_drafts if draft.key is not None]
    if keyed:
        columns = sorted(set().union(*(draft.again for draft, _ in keyed)))
        rows, reason = await read_again(session, table, [key for _, key in keyed], columns)
        for (draft, _), row in zip(keyed, rows, strict=True):
            _repair(draft, row, reason)
    for draft in open_drafts:
        if draft.key is None:
            _repair(draft, None, _NO_KEY)


async def _read_by_database(session: AsyncSession, shape: Shape, drafts: Sequence[_Draft]) -> None:
    targets: list[dict[str, Any]] = []
    rows: list[dict[str, bytes]] = []
    for draft in drafts:
        for target, source in ((draft.new, draft.raw.record), (draft.old, draft.raw.old_record)):
            if target is None or source is None:
                continue
            asked = [name for name in shape.casts if name in source and name not in target]
            row = {name: _as_json(shape, source[name]) for name in asked}
            row = {name: value for name, value in row.items() if name not in shape.cut}
            if row:
                targets.append(target)
                rows.append(row)
    for target, values in zip(targets, await decode_by_database(session, rows, shape.casts), strict=True):
        target.update(values)


def _repair(draft: _Draft, row: Mapping[str, Any] | None, reason: str) -> None:
    """Put what was read again into a draft; `row` is None where there was none, for that reason."""
    new = draft.new
    if new is None:  # pragma: no cover - only new rows are read again
        return
    for name in draft.again:
        if row is not None and name in row:
            hidden_null = name in new and name not in draft.shape.certainly_nan
            # A null that may be NaN is believed unless today's value is one of those that come as null.
            if not hidden_null or _is_not_finite(row[name]):
                new[name] = row[name]
                draft.repaired.add(name)
        elif name not in new or name in draft.shape.certainly_nan:
            new.pop(name, None)
            draft.missing[name] = reason if row is None else _DROPPED


def _is_not_finite(value: Value) -> bool:
    if isinstance(value, Decimal):
        return not value.is_finite()
    return isinstance(value, float) and not math.isfinite(value)
