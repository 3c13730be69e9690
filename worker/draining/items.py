"""From a lane's entries to what a handler is called with: typed keys, or typed changes.

Decoding only; which entries, in which order and under which lock is the drain's business.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from worker.catalogue import Table
from worker.change import Change, Column, Position, RawChange, RawSource
from worker.errors import MalformedChange, NewerFormat
from worker.held import HeldRow
from worker.lanes import UPGRADE, Read
from worker.registry import Handler
from worker.rows.quick import Quick
from worker.rows.repair import build_changes
from worker.schema_watch import SchemaWatch
from worker.schemas import fits
from worker.values import from_canonical

_texts: Final = msgspec.json.Decoder(list[str | None]).decode
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
    history: str | None = None
    """To which the position belongs; None for the present one."""


class Decoder:
    """Decodes for one handler."""

    def __init__(self, handler: Handler, watch: SchemaWatch) -> None:
        self._watch = watch
        self._catalogue = watch.catalogue
        self._handler = handler
        self._types: tuple[str, ...] = ()
        self._version = -1
        self._judged: dict[tuple[str, str], tuple[Column, ...]] = {}
        self._quick = Quick(watch.catalogue, handler.model)

    async def doubt(self, session: AsyncSession) -> None:
        """See whether a table was altered: something has failed, and that may be why."""
        await self._watch.doubt(await session.connection())

    def key(self, key: bytes) -> Any:  # noqa: ANN401 - a value of whatever type the column has
        """Give a derive key its type, which is that of today: the handler computes from today's rows.

        Raises:
            MalformedChange: the table does not have these columns any more.
        """
        if self._version != self._catalogue.version:
            self._types, self._version = self.key_types(), self._catalogue.version
        texts = _texts(key)
        if len(texts) != len(self._types):
            raise MalformedChange("a key of other columns than those by which the handler computes today")
        values = [
            None if text is None else from_canonical(text, type_)
            for text, type_ in zip(texts, self._types, strict=True)
        ]
        return values[0] if len(values) == 1 else tuple(values)

    def key_types(self) -> tuple[str, ...]:
        """Give the types of the key's columns: as they are, or as they were before a table was altered."""
        for one in self._handler.subscriptions:
            for table in self._catalogue.known((one.schema, one.table)):
                columns = one.lane_key or table.primary_key
                if columns and table.columns.keys() >= set(columns):
                    return tuple(table.columns[name].value_type for name in columns)
        return ()

    async def changes(self, session: AsyncSession, reads: Sequence[Read]) -> list[Item]:
        """Decode and repair changes, keeping their order."""
        quick, rest = self._quick.change, list[int]()
        changes: list[Change | None] = []
        for at, (position, entry) in enumerate(reads):
            change = quick(position, entry.source, entry.payload)
            if change is None:
                rest.append(at)
            changes.append(change)
        if rest:
            await self._rest(session, reads, changes, rest)
        return [Item(read, change) for read, change in zip(reads, changes, strict=True) if change is not None]

    async def _rest(
        self, session: AsyncSession, reads: Sequence[Read], changes: list[Change | None], rest: Sequence[int]
    ) -> None:
        """Make those changes that cannot be made in one step."""
        try:
            raws = [
                (reads[at].position, _decode(reads[at].entry.source, reads[at].entry.payload), 1)
                for at in rest
            ]
            built = await self.built(session, raws)
        except BaseException:
            self._quick.forget()
            raise
        self._quick.learn()
        for at in rest:
            changes[at] = built[reads[at].position]

    async def parked(self, session: AsyncSession, rows: Sequence[HeldRow]) -> list[Item]:
        """Decode and repair parked changes, whose positions all differ, keeping their order."""
        raws = [
            (row.kept.position, _decode(row.kept.source, row.kept.payload), row.attempts + 1) for row in rows
        ]
        built = await self.built(session, raws)
        return [_item(row, built[row.kept.position]) for row in rows]

    async def built(
        self, session: AsyncSession, raws: Sequence[tuple[Position, RawChange, int]]
    ) -> dict[Position, Change]:
        """Make typed changes of raw ones, each with its position and attempt; repaired where they need it."""
        by_table: dict[tuple[str, str], list[tuple[Position, RawChange, int]]] = {}
        for one in raws:
            by_table.setdefault((one[1].schema, one[1].table), []).append(one)
        built: dict[Position, Change] = {}
        for name, entries in by_table.items():
            tables = await self._tables(session, name, entries)
            for change in await build_changes(session, tables, entries):
                built[change.position] = self._modelled(change)
        return built

    def _modelled(self, change: Change) -> Change:
        """Tell a change of which model the handler wants its row."""
        model = self._handler.model
        return change if model is None else msgspec.structs.replace(change, model=model)

    async def held(self, session: AsyncSession, row: HeldRow) -> Item:
        """Decode a held change for its next attempt."""
        return (await self.parked(session, [row]))[0]

    async def _tables(
        self, session: AsyncSession, name: tuple[str, str], entries: Sequence[tuple[Position, RawChange, int]]
    ) -> tuple[Table, ...]:
        """Give the pictures of a table, newest first, none of them older than the changes.

        What a change lists may be newer than the catalogue. Its transaction is visible, or it would not be
        here: so is what altered the table before it.
        """
        for _, raw, _ in entries:
            if raw.columns is self._judged.get(name):
                continue
            known = self._catalogue.tables.get(name)
            if known is None or not fits(known, raw.columns):
                await self._watch.read(await session.connection())
            self._judged[name] = raw.columns
        tables = self._catalogue.known(name)
        if not tables:
            raise MalformedChange(f"a change of {name[0]}.{name[1]}, to which no handler subscribes any more")
        return tables


def _item(row: HeldRow, change: Change) -> Item:
    if row.redriven:
        change = msgspec.structs.replace(change, source="redrive")
    return Item(Read(row.kept.position, None), change, row.history)  # type: ignore[arg-type] # held changes have left their lane


def _decode(source: str, payload: bytes) -> RawChange:
    known = _SOURCES.get(source)
    if known is None:
        raise NewerFormat(f"a change is of source {source!r}, {UPGRADE}")
    if not payload:
        raise MalformedChange("a change whose payload is gone from tailrace.payloads")
    return RawChange.decode(known, payload)
