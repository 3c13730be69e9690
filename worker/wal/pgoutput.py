"""Decoder of `pgoutput`, Postgres's logical replication messages: protocol version 1, values as text.

Pure: one message in, one tuple out, with what earlier messages said of tables. It counts ordinals, and knows
neither which changes are wanted nor how messages come here. Streaming of unfinished transactions, two-phase
commit and binary values are not asked for (they change ordinals), so their messages are refused.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, NamedTuple, TypeAlias

from worker.change import LogValue
from worker.errors import MalformedChange
from worker.wal.page import ROW

ABSENT: Final = False
"""Stands for a value that the log does not carry: unchanged TOAST, or no part of the replica identity."""

Row = list[LogValue]
RowType = Literal["INSERT", "UPDATE", "DELETE"]

_UNIX_EPOCH_MICROSECONDS: Final = 946_684_800_000_000  # 2000-01-01 in microseconds since 1970


class RelationColumn(NamedTuple):
    """A column as the log describes it."""

    name: str
    type_oid: int
    typmod: int
    identity: bool
    """Part of the replica identity."""


@dataclass(frozen=True, slots=True, eq=False)
class Relation:
    """A table as it was when the changes after this message were made. Two descriptions are never equal."""

    oid: int
    schema: str
    name: str
    identity: str
    """pg_class.relreplident: d(efault), f(ull), i(ndex), n(othing)."""
    columns: tuple[RelationColumn, ...]
    key: tuple[int, ...]
    """Places of the columns of the replica identity."""


class Begin(NamedTuple):
    """A transaction begins; what follows up to Commit belongs to it."""

    final_lsn: int
    """Start of its commit record: the first half of every position in it."""
    committed: int
    """Time of the commit, microseconds since 1970."""
    xid: int
    """32 bits, without the epoch."""


class Commit(NamedTuple):
    """The transaction is complete."""

    commit_lsn: int
    end_lsn: int
    """End of its commit record; often the commit LSN of the next transaction."""
    committed: int


class TypeName(NamedTuple):
    """Name of a type that is not built in, as of this place in the log; of a domain, its base type's."""

    oid: int
    schema: str
    name: str


class RowChange(NamedTuple):
    """A row was inserted, updated or deleted."""

    type: RowType
    relation: Relation
    ordinal: int
    new: Row | None
    """One value for each column of the relation."""
    old: Row | None
    """The same, of the old row: of the replica identity's columns; None for an INSERT."""


class Truncate(NamedTuple):
    """Tables were emptied by one statement."""

    relations: tuple[Relation, ...]
    ordinal: int
    """Of the first table; each table takes one, in the order of the message."""
    cascade: bool
    restart_identity: bool


class Origin(NamedTuple):
    """The transaction was replicated to this server from another one."""

    commit_lsn: int
    name: str


class LogicalMessage(NamedTuple):
    """What pg_logical_emit_message wrote."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes
    ordinal: int | None = None
    """Of a row of a backfill, which counts as an insert does; see page.py."""


Message: TypeAlias = Begin | Commit | Relation | TypeName | RowChange | Truncate | Origin | LogicalMessage

_BYTE_INT64: Final = struct.Struct(">BQ")
_INT16: Final = struct.Struct(">H")
_INT32: Final = struct.Struct(">I")
_INT64: Final = struct.Struct(">Q")
_TYPMOD: Final = struct.Struct(">Ii")
_BEGIN: Final = struct.Struct(">QqI")
_COMMIT: Final = struct.Struct(">BQQq")
_TRUNCATE: Final = struct.Struct(">IB")
_NULL, _UNCHANGED, _TEXT, _BINARY = b"nutb"
_KEY_TUPLE, _OLD_TUPLE, _NEW_TUPLE = b"KON"
_CASCADE, _RESTART_IDENTITY = 1, 2


class Decoder:
    """Decodes the messages of one stream, or of one call of the slot's functions, in order.

    Each of those describes its tables anew, so each needs a new decoder: an oid may mean another table by
    then.
    """

    def __init__(self) -> None:
        self._relations: dict[int, Relation] = {}
        self._ordinal: int | None = None  # the next one; None outside a transaction

    def decode(self, data: bytes) -> Message:
        """Decode one message.

        Raises:
            MalformedChange: no message of this protocol, or one that cannot come here. Never with a value.
        """
        try:
            decode = self._BY_KIND[data[0]]
        except (IndexError, KeyError):
            kind = data[:1].decode("ascii", "replace")
            raise MalformedChange(f"pgoutput: unexpected message {kind!r} of {len(data)} bytes") from None
        try:
            return decode(self, data)
        except (struct.error, IndexError, KeyError, ValueError) as error:
            if isinstance(error, MalformedChange):
                raise
            raise MalformedChange(
                f"pgoutput: message {chr(data[0])!r} of {len(data)} bytes is damaged ({type(error).__name__})"
            ) from None

    def _begin(self, data: bytes) -> Begin:
        if self._ordinal is not None:
            raise MalformedChange("pgoutput: a transaction begins inside another")
        self._ordinal = 0
        final_lsn, committed, xid = _BEGIN.unpack_from(data, 1)
        return Begin(final_lsn, committed + _UNIX_EPOCH_MICROSECONDS, xid)

    def _commit(self, data: bytes) -> Commit:
        self._take(0)
        self._ordinal = None
        _, commit_lsn, end_lsn, committed = _COMMIT.unpack_from(data, 1)
        return Commit(commit_lsn, end_lsn, committed + _UNIX_EPOCH_MICROSECONDS)

    def _take(self, count: int) -> int:
        """Give the next ordinal of the transaction, and count on."""
        ordinal = self._ordinal
        if ordinal is None:
            raise MalformedChange("pgoutput: a change outside a transaction")
        self._ordinal = ordinal + count
        return ordinal

    def _relation(self, data: bytes) -> Relation:
        (oid,) = _INT32.unpack_from(data, 1)
        schema, at = _string(data, 5)
        name, at = _string(data, at)
        identity, (count,) = chr(data[at]), _INT16.unpack_from(data, at + 1)
        at += 3
        columns: list[RelationColumn] = []
        for _ in range(count):
            flags = data[at]
            column, at = _string(data, at + 1)
            type_oid, typmod = _TYPMOD.unpack_from(data, at)
            at += 8
            columns.append(RelationColumn(column, type_oid, typmod, bool(flags & 1)))
        key = tuple([place for place, column in enumerate(columns) if column.identity])
        # pg_catalog is written as an empty name.
        relation = Relation(oid, schema or "pg_catalog", name, identity, tuple(columns), key)
        self._relations[oid] = relation
        return relation

    def _type(self, data: bytes) -> TypeName:
        (oid,) = _INT32.unpack_from(data, 1)
        schema, at = _string(data, 5)
        return TypeName(oid, schema or "pg_catalog", _string(data, at)[0])

    def _insert(self, data: bytes) -> RowChange:
        relation = self._relation_of(data)
        new, _ = _tuple(data, 5, relation, _NEW_TUPLE)
        return RowChange("INSERT", relation, self._take(1), new, None)

    def _update(self, data: bytes) -> RowChange:
        relation = self._relation_of(data)
        old: Row | None = None
        at = 5
        kind = data[at]
        if kind != _NEW_TUPLE:
            old, at = _tuple(data, at, relation, kind)
            _keep_key(old, relation, kind)
        new, _ = _tuple(data, at, relation, _NEW_TUPLE)
        # The log does not repeat an unchanged TOAST value in the new row, but the old row, where it is
        # carried, has it in full.
        if old is None:
            # Without an old row the columns of the replica identity are what they were.
            old = [ABSENT] * len(new)
            for place in relation.key:
                old[place] = new[place]
        elif ABSENT in new:
            new = [before if after is ABSENT else after for before, after in zip(old, new, strict=True)]
        return RowChange("UPDATE", relation, self._take(1), new, old)

    def _delete(self, data: bytes) -> RowChange:
        relation = self._relation_of(data)
        kind = data[5]
        old, _ = _tuple(data, 5, relation, kind)
        _keep_key(old, relation, kind)
        return RowChange("DELETE", relation, self._take(1), None, old)

    def _truncate(self, data: bytes) -> Truncate:
        count, flags = _TRUNCATE.unpack_from(data, 1)
        if len(data) != 6 + 4 * count:
            raise ValueError
        relations = tuple([self._relations[oid] for (oid,) in _INT32.iter_unpack(data[6:])])
        cascade, restart = bool(flags & _CASCADE), bool(flags & _RESTART_IDENTITY)
        return Truncate(relations, self._take(count), cascade, restart)

    def _origin(self, data: bytes) -> Origin:
        return Origin(_INT64.unpack_from(data, 1)[0], _string(data, 9)[0])

    def _message(self, data: bytes) -> LogicalMessage:
        flags, lsn = _BYTE_INT64.unpack_from(data, 1)
        prefix, at = _string(data, 10)
        (length,) = _INT32.unpack_from(data, at)
        content = data[at + 4 : at + 4 + length]
        if len(content) != length:
            raise ValueError
        transactional = bool(flags & 1)
        ordinal = self._take(1) if transactional and prefix == ROW else None
        return LogicalMessage(transactional, lsn, prefix, content, ordinal)

    def _relation_of(self, data: bytes) -> Relation:
        return self._relations[_INT32.unpack_from(data, 1)[0]]

    _BY_KIND: ClassVar[dict[int, Callable[["Decoder", bytes], Message]]] = {
        ord("B"): _begin,
        ord("C"): _commit,
        ord("R"): _relation,
        ord("Y"): _type,
        ord("I"): _insert,
        ord("U"): _update,
        ord("D"): _delete,
        ord("T"): _truncate,
        ord("O"): _origin,
        ord("M"): _message,
    }
    """By the first byte of a message. What is not here belongs to options that are not asked for."""


def _keep_key(old: Row, relation: Relation, kind: int) -> None:
    """Strike out what a key tuple says of other columns: NULL, whatever they are."""
    if kind == _KEY_TUPLE:
        for place, column in enumerate(relation.columns):
            if not column.identity:
                old[place] = ABSENT
    elif kind != _OLD_TUPLE:
        raise ValueError


def _tuple(data: bytes, at: int, relation: Relation, kind: int) -> tuple[Row, int]:
    """Read a row, and where it ends. Lengths are unsigned: Postgres's values end at 1 GB."""
    if data[at] != kind:
        raise ValueError
    (count,) = _INT16.unpack_from(data, at + 1)
    if count != len(relation.columns):
        raise ValueError
    at += 3
    values: Row = []
    length = _INT32.unpack_from
    for _ in range(count):
        form = data[at]
        if form == _TEXT:
            start = at + 5
            at = start + length(data, at + 1)[0]
            values.append(data[start:at])
        elif form == _NULL:
            values.append(None)
            at += 1
        elif form == _UNCHANGED:
            values.append(ABSENT)
            at += 1
        elif form == _BINARY:
            raise MalformedChange("pgoutput: a binary value, though text was asked for")
        else:
            raise ValueError
    if at > len(data):
        raise ValueError
    return values, at


def _string(data: bytes, start: int) -> tuple[str, int]:
    end = data.index(0, start)
    return data[start:end].decode(), end + 1
