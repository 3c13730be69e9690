"""A change as its source wrote it: what goes into a lane, and is read from there again.

Values stay as they came. It knows nothing of where changes come from or go to; handlers see change.py.
"""

import datetime as dt
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Literal, NamedTuple

import msgspec

from worker.errors import MalformedChange

ChangeType = Literal["INSERT", "UPDATE", "DELETE", "TRUNCATE"]
RawSource = Literal["realtime", "wal"]


_tuple: Final = tuple.__new__


class _Pair(NamedTuple):
    lsn: int
    ordinal: int


class Position(_Pair):
    """Where a change stands: (LSN of its commit, ordinal within the transaction), in total order.

    Its text, "<lsn>-<ordinal>", is the id of a Redis stream entry. In plain delivery the listener gives it:
    milliseconds, and a number within them.
    """

    __slots__ = ()
    ZERO: ClassVar["Position"]

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Read the text of a position.

        Raises:
            ValueError: not two numbers with a dash between.
        """
        lsn, _, ordinal = text.partition("-")  # the ordinal of a boundary is -1, with a dash of its own
        return _tuple(cls, (int(lsn), int(ordinal)))  # several for each change: cls(…) takes twice as long

    @classmethod
    def of_id(cls, id_: bytes) -> "Position":
        """Read the id of a stream's entry.

        Raises:
            ValueError: as `parse`.
        """
        lsn, _, ordinal = id_.partition(b"-")
        return _tuple(cls, (int(lsn), int(ordinal)))

    def __str__(self) -> str:
        return f"{self.lsn}-{self.ordinal}"


Position.ZERO = Position(0, 0)


class Column(msgspec.Struct, frozen=True):
    """A column as a payload lists it.

    Attributes:
        name: its name at that time.
        type: pg_type.typname of its type, as in "_int4" for an array.
        type_oid: pg_type.oid of a type that is not built in, which outlives its name; 0 where nobody says.
        key: the log says that it is the primary key.
    """

    name: str
    type: str
    type_oid: int = 0
    key: bool = False


class _Payload(msgspec.Struct, frozen=True, gc=False):
    """What is read of payload.data."""

    schema: str
    table: str
    type: ChangeType
    columns: msgspec.Raw
    record: dict[str, msgspec.Raw] | None = None
    old_record: dict[str, msgspec.Raw] | None = None
    commit_timestamp: str | None = None
    errors: tuple[str, ...] | None = None


class Outline(msgspec.Struct, frozen=True, gc=False):
    """What is read of payload.data where its rows are read later, in one go; `null` where there is none."""

    schema: str
    table: str
    type: ChangeType
    columns: msgspec.Raw
    record: msgspec.Raw = msgspec.Raw(b"null")
    old_record: msgspec.Raw = msgspec.Raw(b"null")
    commit_timestamp: str | None = None
    errors: tuple[str, ...] | None = None


outline: Final = msgspec.json.Decoder(Outline).decode
_payload: Final = msgspec.json.Decoder(_Payload).decode
_column_list: Final = msgspec.json.Decoder(tuple[Column, ...]).decode

# All changes of a table carry the same list of columns: read once, and the same object ever after, which
# later steps recognise it by. Emptied when full, so that tables which change their shape for ever do not fill
# memory.
_known_columns: Final[dict[bytes, tuple[Column, ...]]] = {}
_KNOWN_COLUMNS_LIMIT: Final = 1024


def columns_of_payload(text: bytes) -> tuple[Column, ...]:
    """Read the list of columns of a payload; of equal texts it is the same object."""
    known = _known_columns.get(text)
    if known is None:
        if len(_known_columns) >= _KNOWN_COLUMNS_LIMIT:
            _known_columns.clear()
        known = _known_columns[text] = _column_list(text)
    return known


class _LogColumn(msgspec.Struct, frozen=True, array_like=True):
    """A `Column` in a `LogChange`, without what says nothing."""

    name: str
    type: str
    type_oid: int = 0
    key: bool = False


_log_column_list: Final = msgspec.msgpack.Decoder(list[_LogColumn]).decode
_known_log_columns: Final[dict[bytes, tuple[tuple[Column, ...], tuple[str, ...]]]] = {}


def columns_of_log(raw: bytes) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """Read a list of columns of the log; gives them, and their names alone. See `columns_of_payload`."""
    known = _known_log_columns.get(raw)
    if known is not None:
        return known
    if len(_known_log_columns) >= _KNOWN_COLUMNS_LIMIT:
        _known_log_columns.clear()
    columns = tuple([Column(one.name, one.type, one.type_oid, one.key) for one in _log_column_list(raw)])
    known = _known_log_columns[raw] = (columns, tuple([column.name for column in columns]))
    return known


def encode_columns(columns: Sequence[Column]) -> bytes:
    """Write a list of columns for a `LogChange`; once for each table."""
    written: list[tuple[object, ...]] = []
    for one in columns:
        row = (one.name, one.type, one.type_oid, one.key)
        # It is part of every entry: what most columns have not is left out.
        written.append(row if one.key else row[:3] if one.type_oid else row[:2])
    return msgspec.msgpack.encode(written)


class Given(NamedTuple):
    """By what right a row that was not changed comes through the log.

    Attributes:
        backfill: its id.
        secret: what the row of the backfill says, too.
        handler: the only one that is given the row.
    """

    backfill: int
    secret: str
    handler: str


# A value of the write-ahead log: Postgres's text, None for NULL, False for what the log does not carry.
LogValue = bytes | bool | None


class LogChange(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A change of the write-ahead log as it goes through a lane, in msgpack.

    It outlives versions in held rows: fields may be added at the end, with a default, and none may go.

    Attributes:
        schema: schema of the table.
        table: name of the table.
        type: what happened.
        columns: the list of columns, as `encode_columns` gives it.
        record: values of the new row in the order of the columns; None for DELETE and TRUNCATE.
        old_record: values of the old row in the order of the columns; None for INSERT and TRUNCATE.
        committed: time of the commit, microseconds since 1970.
        xid: the transaction, 32 bits.
        lsn: of the commit.
        ordinal: within the transaction.
        table_oid: pg_class.oid of the table, which outlives its name; 0 where it was written before this was.
        backfill: id of the backfill that read the row, which nobody had changed; else 0.
    """

    schema: str
    table: str
    type: ChangeType
    columns: bytes
    record: list[LogValue] | None
    old_record: list[LogValue] | None
    committed: int
    xid: int
    lsn: int
    ordinal: int
    table_oid: int = 0
    backfill: int = 0


decode_log: Final = msgspec.msgpack.Decoder(LogChange).decode
_log_encode: Final = msgspec.msgpack.Encoder().encode
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@functools.lru_cache(maxsize=64)
def moment_of(microseconds: int) -> dt.datetime:
    """Give microseconds since 1970 as a time; all changes of a transaction ask for the same."""
    return _EPOCH + dt.timedelta(microseconds=microseconds)


@functools.lru_cache(maxsize=64)
def _iso(microseconds: int) -> str:
    return moment_of(microseconds).isoformat(timespec="microseconds")


def _carried(names: tuple[str, ...], values: list[LogValue]) -> dict[str, Any]:
    """Name the values of a row, without those that the log does not carry."""
    if len(values) != len(names):
        raise msgspec.ValidationError("as many values as columns are wanted")
    row = dict(zip(names, values, strict=True))
    if False in values:
        return {name: value for name, value in row.items() if value is not False}
    return row


class RawChange(msgspec.Struct, frozen=True, gc=False):
    """A change as its source wrote it.

    Attributes:
        source: who wrote it; it decides how values are read.
        schema: schema of the table.
        table: name of the table; of a partition, its own.
        type: what happened.
        columns: the table's columns at that time, as far as we may read them.
        record: the new row; None for DELETE and TRUNCATE. Values of Realtime are JSON texts (msgspec.Raw),
            those of the log Postgres's text (bytes) or None for NULL. A column that the source left out, such
            as an unchanged TOAST value, is not there.
        old_record: what is known of the old row, by replica identity; None for INSERT and TRUNCATE, and for
            an UPDATE of which the log has no old values.
        commit_timestamp: ISO text, one per transaction, in milliseconds (of the log in microseconds); None in
            refusals (errors 400 and 401).
        errors: Realtime's complaints, such as "Error 413: Payload Too Large".
        payload: what goes into a lane; `decode` makes the same change of it again.
        xid: transaction that wrote it, 32 bits, without its epoch; None where the source does not say.
        position: where it stands in the log; None where the source does not say.
        table_oid: pg_class.oid of the table; 0 where the source does not say.
        backfill: id of the backfill that read the row; 0 of what was changed.
        given: by what right it comes, as long as that is not examined; None of what was changed.
    """

    source: RawSource
    schema: str
    table: str
    type: ChangeType
    columns: tuple[Column, ...]
    record: dict[str, Any] | None
    old_record: dict[str, Any] | None
    commit_timestamp: str | None
    errors: tuple[str, ...]
    payload: bytes
    xid: int | None = None
    position: Position | None = None
    table_oid: int = 0
    backfill: int = 0
    given: Given | None = None

    @classmethod
    def of_log(
        cls, log: LogChange, payload: bytes | None = None, *, given: Given | None = None
    ) -> "RawChange":
        """Make a change of the write-ahead log; `payload` is what it was read from, if it was."""
        columns, names = columns_of_log(log.columns)
        return cls(
            "wal",
            log.schema,
            log.table,
            log.type,
            columns,
            None if log.record is None else _carried(names, log.record),
            None if log.old_record is None else _carried(names, log.old_record),
            _iso(log.committed),
            (),
            _log_encode(log) if payload is None else payload,
            log.xid,
            Position(log.lsn, log.ordinal),
            log.table_oid,
            log.backfill,
            given,
        )

    @classmethod
    def decode(cls, source: RawSource, payload: bytes) -> "RawChange":
        """Read a change: JSON of Realtime's payload.data, or what `of_log` wrote. Values stay as they are.

        Raises:
            MalformedChange: not such a text. The message names the part, never a value.
        """
        try:
            if source == "wal":
                return cls.of_log(decode_log(payload), payload)
            data = _payload(payload)
            columns = columns_of_payload(bytes(data.columns))
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, OverflowError) as error:
            raise MalformedChange(f"this payload is no change: {_complaint(error)}") from None
        return cls(
            source,
            data.schema,
            data.table,
            data.type,
            columns,
            data.record,
            data.old_record,
            data.commit_timestamp,
            data.errors or (),
            payload,
        )


def _complaint(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its JSON is nested too deeply"
    # Of an unknown enum value msgspec quotes the value; of all else it names types and paths.
    return str(error).split("'", 1)[0].strip() if "Invalid enum value" in str(error) else str(error)
