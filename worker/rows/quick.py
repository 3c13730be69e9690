"""Typed changes in one step: how nearly all changes of a backlog are made.

Where the list of columns is known, a payload is read straight into values of their types, without a text of
each in between and without a call for each. Whatever is out of the ordinary (a value left out, one that only
Postgres reads, a NULL that may be NaN, what does not parse) is left to repair.py, which knows all cases; so
is a list of columns that has not been judged yet.
"""

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

import msgspec

from worker.catalogue import Catalogue, Table
from worker.change import Change, ChangeSource, LogChange, Position, Record
from worker.raw import Outline, columns_of_log, columns_of_payload, decode_log, moment_of, outline
from worker.rows.repair import absent_from_old
from worker.rows.shape import Shape, shape_of
from worker.values.decoding import UNREADABLE, Decoder, RowDecoder, quick_text, row_decoder
from worker.values.scalars import Value

_NULL: Final = msgspec.Raw(b"null")
_NOTHING: Final[frozenset[str]] = frozenset()
_MOST: Final = 1024
"""Lists of columns that are remembered: tables that change their shape for ever do not fill memory."""

Key = tuple[Literal["realtime", "wal"], str, str, bytes]
"""Source, schema, table, and the list of columns as it is written."""


class Quick:
    """Makes changes for one handler.

    Args:
        catalogue: of the tables.
        model: what the handler has annotated, as in `Change[Order]`.
    """

    def __init__(self, catalogue: Catalogue, model: type[Any] | None) -> None:
        self._catalogue = catalogue
        self._model = model
        self._version = -1
        self._readers: dict[Key, _Json | _Log | None] = {}
        self._asked: dict[Key, None] = {}

    def change(self, position: Position, source: str, payload: bytes) -> Change | None:
        """Make the change, or give None where that is not to be done here."""
        if self._version != self._catalogue.version:
            self._readers, self._version = {}, self._catalogue.version
        try:
            if source == "wal":
                return self._of_log(position, decode_log(payload))
            if source == "realtime":
                return self._of_json(position, outline(payload))
        except (*UNREADABLE, KeyError, UnicodeDecodeError):
            pass  # whose fault it is, and whether it is one, is said elsewhere
        return None

    def learn(self) -> None:
        """Remember the lists of columns that `change` has met; they have been judged since."""
        if len(self._readers) + len(self._asked) > _MOST:
            self._readers = {}
        for key in self._asked:
            self._readers[key] = self._reader(*key)
        self._asked = {}

    def forget(self) -> None:
        """Do not remember them: they could not be judged."""
        self._asked = {}

    def _reader(
        self, source: Literal["realtime", "wal"], schema: str, table: str, text: bytes
    ) -> "_Json | _Log | None":
        tables = self._catalogue.known((schema, table))
        if not tables:
            return None
        columns = columns_of_log(text)[0] if source == "wal" else columns_of_payload(text)
        shape = shape_of(tables, columns, source)
        if not shape.plain or len(shape.types) < len(columns):
            return None
        return _log(tables[0], shape) if source == "wal" else _json(tables[0], shape)

    def _of_json(self, position: Position, data: Outline) -> Change | None:
        key: Key = ("realtime", data.schema, data.table, bytes(data.columns))
        reader = self._readers.get(key, self)
        if reader is self:
            self._asked[key] = None
        if not isinstance(reader, _Json) or data.errors:
            return None
        new = old = None
        if data.record != _NULL:
            new = reader.whole(data.record)
            for name in reader.nan:
                if new[name] is None:
                    return None
        if data.old_record != _NULL:
            old = reader.part(data.old_record)
            for name in reader.certainly_nan:
                if old.get(name, 0) is None:
                    return None
        at = data.commit_timestamp
        moment = None if at is None else dt.datetime.fromisoformat(at)
        return self._made(reader, position, data, new, old, moment, reader.source)

    def _of_log(self, position: Position, log: LogChange) -> Change | None:
        key: Key = ("wal", log.schema, log.table, log.columns)
        reader = self._readers.get(key, self)
        if reader is self:
            self._asked[key] = None
        if not isinstance(reader, _Log):
            return None
        new = old = None
        if log.record is not None:
            if False in log.record:
                return None
            new = reader.row(log.record)
        if log.old_record is not None:
            old = reader.row(log.old_record)
        source: ChangeSource = "backfill" if log.backfill else reader.source
        return self._made(reader, position, log, new, old, moment_of(log.committed), source)

    def _made(
        self,
        reader: "_Json | _Log",
        position: Position,
        raw: Outline | LogChange,
        new: dict[str, Value] | None,
        old: dict[str, Value] | None,
        moment: dt.datetime | None,
        source: ChangeSource,
    ) -> Change:
        missing = _NOTHING
        record = old_record = None
        if old is not None:
            absent = absent_from_old(reader.table, reader.shape, raw, old)
            old_record = Record(old, absent.reasons)
            if raw.type == "DELETE":
                missing = absent.columns
        if new is not None:
            record = Record(new)
        return Change(
            position=position,
            schema=raw.schema,
            table=raw.table,
            type=raw.type,
            record=record,
            old_record=old_record,
            key=reader.shape.key_of(old if new is None else new),
            commit_timestamp=moment,
            source=source,
            missing=missing,
            model=self._model,
        )


class _Json(msgspec.Struct, frozen=True):
    """Reads rows of Realtime of one list of columns."""

    table: Table
    shape: Shape
    whole: RowDecoder
    part: RowDecoder
    nan: tuple[str, ...]
    certainly_nan: tuple[str, ...]
    source: Literal["realtime"] = "realtime"


def _json(table: Table, shape: Shape) -> _Json | None:
    whole, part = row_decoder(shape.types, whole=True), row_decoder(shape.types, whole=False)
    if whole is None or part is None:
        return None
    return _Json(table, shape, whole, part, tuple(shape.nan), tuple(shape.certainly_nan))


class _Log(msgspec.Struct, frozen=True):
    """Reads rows of the log of one list of columns."""

    table: Table
    shape: Shape
    names: tuple[str, ...]
    decoders: tuple[Decoder, ...]
    source: Literal["wal"] = "wal"

    def row(self, values: Sequence[Any]) -> dict[str, Value]:
        """Read values in the order of the columns, without those that the log does not carry."""
        if False in values:
            named = zip(self.names, self.decoders, values, strict=True)
            return {
                name: None if value is None else decode(value)
                for name, decode, value in named
                if value is not False
            }
        read = [
            None if value is None else decode(value)
            for decode, value in zip(self.decoders, values, strict=True)
        ]
        return dict(zip(self.names, read, strict=True))


def _log(table: Table, shape: Shape) -> _Log | None:
    decoders: list[Callable[[bytes], Value]] = []
    for name in shape.types.values():
        quick = quick_text(name)
        if quick is None:
            return None
        decoders.append(quick)
    return _Log(table, shape, tuple(shape.types), tuple(decoders))
