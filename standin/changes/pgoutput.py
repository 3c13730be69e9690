"""Decoder of the logical replication messages of `pgoutput`, protocol version 1, text values.

Pure: bytes to tuples. It does not know what a subscription is, and it keeps values as the bytes of
their text form; rendering them is the business of `standin.changes.rendering`.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import NamedTuple


class Absent(Enum):
    """Marks a value that the log does not carry."""

    UNCHANGED = "unchanged TOAST"


UNCHANGED = Absent.UNCHANGED
Value = bytes | None | Absent
"""Text form of a value; None is NULL; UNCHANGED is a TOASTed value that the update did not touch."""

EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
WHOLE_ROW_IDENTITY = "f"


class RelationColumn(NamedTuple):
    """A column as the log describes it."""

    name: str
    type_oid: int
    in_identity: bool


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as it was when the change was made."""

    oid: int
    schema: str
    name: str
    identity: str
    columns: tuple[RelationColumn, ...]


class RowChange(NamedTuple):
    """One row that was inserted, updated or deleted.

    `new` and `old` have one value per column of the relation, or are None where the log has none.
    `old_is_key` says that only the identity columns of `old` mean something. `size` is the number
    of bytes of the message.
    """

    type: str
    relation: Relation
    new: list[Value] | None
    old: list[Value] | None
    old_is_key: bool
    commit_timestamp: str
    size: int


_INT32 = struct.Struct(">I")
_INT16 = struct.Struct(">H")
_BEGIN = struct.Struct(">QqI")
_INSERT, _UPDATE, _DELETE, _BEGIN_TX, _RELATION = b"IUDBR"
_KEY_TUPLE, _NEW_TUPLE = b"KN"
_NULL, _UNCHANGED, _TEXT = b"nut"


def timestamp(microseconds: int) -> str:
    """Return a commit time in microseconds since 2000 as frames show it: UTC, cut to milliseconds."""
    moment = EPOCH + timedelta(microseconds=microseconds)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


class Decoder:
    """Turns the messages of one call of the slot function into row changes.

    A new one is needed for each call: relation messages are repeated in each, and object ids may
    mean another table by then.
    """

    def __init__(self) -> None:
        self._relations: dict[int, Relation] = {}
        self._timestamp = ""

    def changes(self, messages: Iterable[bytes]) -> Iterator[RowChange]:
        """Yield the row changes of `messages`, whole transactions in commit order."""
        for data in messages:
            kind = data[0]
            if kind == _INSERT:
                relation = self._relations[_INT32.unpack_from(data, 1)[0]]
                new, _ = _tuple(data, 6)
                yield RowChange("INSERT", relation, new, None, False, self._timestamp, len(data))  # noqa: FBT003 - a field
            elif kind == _UPDATE:
                yield self._update(data)
            elif kind == _DELETE:
                relation = self._relations[_INT32.unpack_from(data, 1)[0]]
                old, _ = _tuple(data, 6)
                yield RowChange(
                    "DELETE", relation, None, old, data[5] == _KEY_TUPLE, self._timestamp, len(data)
                )
            elif kind == _BEGIN_TX:
                self._timestamp = timestamp(_BEGIN.unpack_from(data, 1)[1])
            elif kind == _RELATION:
                relation = _relation(data)
                self._relations[relation.oid] = relation
            # Commit, Truncate, Type, Origin and Message make no frame.

    def _update(self, data: bytes) -> RowChange:
        relation = self._relations[_INT32.unpack_from(data, 1)[0]]
        old, old_is_key, position = None, False, 5
        if data[5] != _NEW_TUPLE:
            old_is_key = data[5] == _KEY_TUPLE
            old, position = _tuple(data, 6)
        new, _ = _tuple(data, position + 1)
        return RowChange("UPDATE", relation, new, old, old_is_key, self._timestamp, len(data))


def _tuple(data: bytes, position: int) -> tuple[list[Value], int]:
    (count,) = _INT16.unpack_from(data, position)
    position += 2
    values: list[Value] = []
    for _ in range(count):
        kind = data[position]
        if kind == _TEXT:
            start = position + 5
            position = start + _INT32.unpack_from(data, position + 1)[0]
            values.append(data[start:position])
        else:
            if kind not in (_NULL, _UNCHANGED):
                raise ValueError(
                    f"pgoutput: unknown kind of column value {kind:#x}; text values were asked for"
                )
            values.append(None if kind == _NULL else UNCHANGED)
            position += 1
    return values, position


def _relation(data: bytes) -> Relation:
    (oid,) = _INT32.unpack_from(data, 1)
    schema, position = _cstring(data, 5)
    name, position = _cstring(data, position)
    identity = chr(data[position])
    (count,) = _INT16.unpack_from(data, position + 1)
    position += 3
    columns = []
    for _ in range(count):
        flags = data[position]
        column, position = _cstring(data, position + 1)
        (type_oid,) = _INT32.unpack_from(data, position)
        position += 8
        columns.append(RelationColumn(column, type_oid, bool(flags & 1)))
    # An empty schema means pg_catalog; no such table is ever published.
    return Relation(oid, schema, name, identity, tuple(columns))


def _cstring(data: bytes, position: int) -> tuple[str, int]:
    end = data.index(0, position)
    return data[position:end].decode(), end + 1
