"""How rows of one table were written at one time: a decoder for each column of a payload's list.

Types come from the payload, which is as old as the change; the catalogue, which is newer, only helps where
the payload's word says too little (a domain's base type, the schema of a type) and still means the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from worker.catalogue import ColumnInfo, Table, quote
from worker.change import Column, RawSource
from worker.schemas import is_of_type, key_of
from worker.values.decoding import UNREADABLE, Decoder, decoder, strict_decoder, written_value
from worker.values.scalars import Value
from worker.values.wire import is_cut, may_hide_nan

_REALTIME: Final = "realtime"


@dataclass(frozen=True, slots=True)
class Shape:
    """The columns of a payload, sorted by what reading them takes.

    Attributes:
        names: all columns of the payload's list.
        types: of each column, in the order of the list, the name of the type by which it is decoded.
        strict: decoders that raise on what they do not know; without the columns in `casts`.
        total: the same, but never raising.
        casts: columns that Postgres must read, each with the name of its type.
        cut: columns of which only the first character comes.
        nan: columns whose null may be NaN; `certainly_nan` those of them that cannot be null.
        plain: neither casts nor cut: values are ready once decoded.
        key: columns of the primary key, as they were called then.
        rereads: the row can be read again by that key.
    """

    names: frozenset[str]
    types: Mapping[str, str]
    strict: Mapping[str, Decoder]
    total: Mapping[str, Decoder]
    casts: Mapping[str, str]
    cut: frozenset[str]
    nan: frozenset[str]
    certainly_nan: frozenset[str]
    plain: bool
    key: tuple[str, ...] = ()
    rereads: bool = True
    of_log: bool = False
    """Values are Postgres's texts, not JSON."""
    _absent: dict[tuple[object, ...], "Absent"] = field(default_factory=dict)

    def key_of(self, row: dict[str, Any] | None) -> tuple[Any, ...]:
        """Give the values of the primary key; none where one of them is missing."""
        if row is None:
            return ()
        try:
            # Not by a Record's own way, which says why a column is missing.
            return tuple([dict.__getitem__(row, name) for name in self.key])
        except KeyError:
            return ()

    def read(self, row: Mapping[str, msgspec.Raw]) -> dict[str, Any]:
        """Decode the values of a row, without those that Postgres must read (unless they are NULL)."""
        if self.of_log:
            return self._read_log(row)
        strict = self.strict
        try:
            return {name: strict[name](value) for name, value in row.items()}
        except (*UNREADABLE, KeyError):
            return {
                name: self._read_one(name, bytes(value))
                for name, value in row.items()
                if name not in self.casts or value == _NULL
            }

    def _read_log(self, row: Mapping[str, bytes | None]) -> dict[str, Any]:
        """Decode Postgres's texts; NULL is None."""
        total, casts = self.total, self.casts
        return {
            name: None if value is None else total[name](value)
            for name, value in row.items()
            if value is None or name not in casts
        }

    def _read_one(self, name: str, raw: bytes) -> Value:
        total = self.total.get(name)
        return written_value(raw) if total is None else total(raw)

    def absent(self, present: Iterable[str], reason: str) -> "Absent":
        """Name the columns that are not present, with one reason for all."""
        key = (reason, *present)
        known = self._absent.get(key)
        if known is None:
            columns = self.names.difference(present)
            known = self._absent[key] = Absent(dict.fromkeys(columns, reason), frozenset(columns))
        return known


_NULL: Final = msgspec.Raw(b"null")


@dataclass(frozen=True, slots=True)
class Absent:
    """Columns without a value: with their reasons, and as a set."""

    reasons: Mapping[str, str]
    columns: frozenset[str]


def shape_of(tables: Sequence[Table], columns: tuple[Column, ...], source: RawSource) -> Shape:
    """Work out how payloads with this list of columns are read.

    Args:
        tables: pictures of the table, newest first; not empty.
        columns: of the payload.
        source: who wrote it.
    """
    table = tables[0]
    key = key_of(tables, columns)
    strict: dict[str, Decoder] = {}
    total: dict[str, Decoder] = {}
    casts: dict[str, str] = {}
    infos = {column.name: _info(table, column) for column in columns}
    types: dict[str, str] = {}
    for column in columns:
        info = infos[column.name]
        name = types[column.name] = column.type if info is None else info.value_type
        safe = decoder(name, "text" if source == "wal" else "json")
        quick = safe if source == "wal" else strict_decoder(name)
        if quick is None or safe is None:
            casts[column.name] = quote(column.type) if info is None else info.sql_cast
        else:
            strict[column.name], total[column.name] = quick, safe
    known = [info for info in infos.values() if info is not None] if source == _REALTIME else []
    cut = frozenset(info.name for info in known if is_cut(info))
    nan = [info for info in known if may_hide_nan(info)]
    return Shape(
        names=frozenset(infos),
        types=types,
        strict=strict,
        total=total,
        casts=casts,
        cut=cut,
        nan=frozenset(info.name for info in nan),
        certainly_nan=frozenset(info.name for info in nan if info.not_null),
        plain=not casts and not cut,
        key=key,
        # By another key, or one that has another name now, another row might be found.
        rereads=key == table.primary_key,
        of_log=source == "wal",
    )


def _info(table: Table, column: Column) -> ColumnInfo | None:
    """Find what the catalogue still says of a payload's column: the column, else any other of that type."""
    info = table.columns.get(column.name)
    if info is not None and is_of_type(info, column):
        return info
    for other in table.columns.values():
        if is_of_type(other, column) and other.typmod == -1:
            return ColumnInfo(column.name, column.type, other.sql_type, value=other.value, cast=other.cast)
    return None
