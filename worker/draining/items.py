"""From a lane's entries to what a handler is called with: typed keys, or typed changes.

Decoding only; which entries, in which order and under which lock is the drain's business.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from worker.catalogue import Catalogue, Table
from worker.change import Change, Position, RawChange, RawSource
from worker.errors import MalformedChange
from worker.held import HeldRow
from worker.lanes import Read
from worker.registry import Handler
from worker.rows.repair import build_changes
from worker.values import from_canonical

_SOURCES: Mapping[str, RawSource] = {"realtime": "realtime", "wal": "wal"}


class KeyItem(NamedTuple):
    """A derive handler's key."""

    key: bytes
    """The lane key."""
    value: Any
    """What the handler is given: the typed value, or a tuple of several columns' values."""
    changes: int
    """Changes that lie behind it in this batch."""


class Item(NamedTuple):
    """A change handler's change."""

    read: Read
    change: Change


class Decoder:
    """Decodes for one handler."""

    def __init__(self, handler: Handler, catalogue: Catalogue) -> None:
        self._tables = catalogue.tables
        self._types: tuple[str, ...] = ()
        if handler.kind == "derive":
            first = handler.subscriptions[0]
            table = self._tables[first.schema, first.table]
            columns = first.lane_key or table.primary_key
            self._types = tuple(table.columns[name].value_type for name in columns)

    def key(self, key: bytes) -> Any:  # noqa: ANN401 - a value of whatever type the column has
        """Give a derive key its type."""
        texts: list[str | None] = msgspec.json.decode(key)
        values = [
            None if text is None else from_canonical(text, type_)
            for text, type_ in zip(texts, self._types, strict=True)
        ]
        return values[0] if len(values) == 1 else tuple(values)

    async def changes(self, session: AsyncSession, reads: Sequence[Read]) -> list[Item]:
        """Decode and repair changes, keeping their order."""
        raws = [(read.position, _decode(read.entry.source, read.entry.payload), 1) for read in reads]
        built = await self._built(session, raws)
        return [Item(read, built[read.position]) for read in reads]

    async def parked(self, session: AsyncSession, rows: Sequence[HeldRow]) -> list[Item]:
        """Decode and repair parked changes, whose positions all differ, keeping their order."""
        raws = [
            (row.kept.position, _decode(row.kept.source, row.kept.payload), row.attempts + 1) for row in rows
        ]
        built = await self._built(session, raws)
        return [_item(row, built[row.kept.position]) for row in rows]

    async def _built(
        self, session: AsyncSession, raws: Sequence[tuple[Position, RawChange, int]]
    ) -> dict[Position, Change]:
        by_table: dict[tuple[str, str], list[tuple[Position, RawChange, int]]] = {}
        for one in raws:
            by_table.setdefault((one[1].schema, one[1].table), []).append(one)
        built: dict[Position, Change] = {}
        for name, entries in by_table.items():
            for change in await build_changes(session, self._table(name), entries):
                built[change.position] = change
        return built

    async def held(self, session: AsyncSession, row: HeldRow) -> Item:
        """Decode a held change for its next attempt."""
        return (await self.parked(session, [row]))[0]

    def _table(self, name: tuple[str, str]) -> Table:
        table = self._tables.get(name)
        if table is None:
            raise MalformedChange(f"a change of {name[0]}.{name[1]}, to which no handler subscribes any more")
        return table


def _item(row: HeldRow, change: Change) -> Item:
    return Item(Read(row.kept.position, None), change)  # type: ignore[arg-type] # held changes have left their lane


def _decode(source: str, payload: bytes) -> RawChange:
    known = _SOURCES.get(source)
    if known is None:
        raise MalformedChange(f"unknown source {source!r}")
    return RawChange.decode(known, payload)
