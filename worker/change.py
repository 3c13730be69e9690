"""A change, in both of its shapes: raw as its source wrote it, and typed as handlers see it.

It knows nothing of where changes come from or go to, and makes no typed change itself (see rows/repair.py).
"""

import builtins
import datetime as dt
import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, Protocol, TypeVar, cast

import msgspec

from worker.errors import MalformedChange, MissingValueError, SessionMisuse
from worker.instances import detached
from worker.values.scalars import Value

if TYPE_CHECKING:
    # Only names in annotations here, and slow to import: seconds at every start of every process.
    from redis.asyncio import Redis
    from sqlalchemy.orm import InstrumentedAttribute
    from structlog.typing import FilteringBoundLogger
    from supabase import AsyncClient

ModelT = TypeVar("ModelT")
RelatedT = TypeVar("RelatedT")

ChangeType = Literal["INSERT", "UPDATE", "DELETE", "TRUNCATE"]
RawSource = Literal["realtime", "wal"]
ChangeSource = Literal["wal", "realtime", "backfill", "redrive"]

_NO_REASONS: Final[Mapping[str, str]] = {}


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
        return cls(int(lsn), int(ordinal))

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


class _Payload(msgspec.Struct, frozen=True):
    """What is read of payload.data."""

    schema: str
    table: str
    type: ChangeType
    columns: msgspec.Raw
    record: dict[str, msgspec.Raw] | None = None
    old_record: dict[str, msgspec.Raw] | None = None
    commit_timestamp: str | None = None
    errors: tuple[str, ...] | None = None


_payload: Final = msgspec.json.Decoder(_Payload).decode
_column_list: Final = msgspec.json.Decoder(tuple[Column, ...]).decode

# All changes of a table carry the same list of columns: read once, and the same object ever after, which
# later steps recognise it by. Emptied when full, so that tables which change their shape for ever do not fill
# memory.
_known_columns: Final[dict[bytes, tuple[Column, ...]]] = {}
_KNOWN_COLUMNS_LIMIT: Final = 1024


def _columns(raw: msgspec.Raw) -> tuple[Column, ...]:
    text = bytes(raw)
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


def _log_columns(raw: bytes) -> tuple[tuple[Column, ...], tuple[str, ...]]:
    """Read a list of columns of the log; gives them, and their names alone."""
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


# A value of the write-ahead log: Postgres's text, None for NULL, False for what the log does not carry.
LogValue = bytes | bool | None


class LogChange(msgspec.Struct, frozen=True, array_like=True):
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


_log_decode: Final = msgspec.msgpack.Decoder(LogChange).decode
_log_encode: Final = msgspec.msgpack.Encoder().encode
_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


@functools.lru_cache(maxsize=64)
def _iso(microseconds: int) -> str:
    """Give microseconds since 1970 as ISO text; all changes of a transaction ask for the same."""
    return (_EPOCH + dt.timedelta(microseconds=microseconds)).isoformat(timespec="microseconds")


def _carried(names: tuple[str, ...], values: list[LogValue]) -> dict[str, Any]:
    """Name the values of a row, without those that the log does not carry."""
    if len(values) != len(names):
        raise msgspec.ValidationError("as many values as columns are wanted")
    row = dict(zip(names, values, strict=True))
    if False in values:
        return {name: value for name, value in row.items() if value is not False}
    return row


class RawChange(msgspec.Struct, frozen=True):
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

    @classmethod
    def of_log(cls, log: LogChange, payload: bytes | None = None) -> "RawChange":
        """Make a change of the write-ahead log; `payload` is what it was read from, if it was."""
        columns, names = _known_log_columns.get(log.columns) or _log_columns(log.columns)
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
        )

    @classmethod
    def decode(cls, source: RawSource, payload: bytes) -> "RawChange":
        """Read a change: JSON of Realtime's payload.data, or what `of_log` wrote. Values stay as they are.

        Raises:
            MalformedChange: not such a text. The message names the part, never a value.
        """
        try:
            if source == "wal":
                return cls.of_log(_log_decode(payload), payload)
            data = _payload(payload)
            columns = _columns(data.columns)
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


class Record(dict[str, Any]):
    """A row, by column. Asking for a column whose value is missing raises MissingValueError, which says why.

    A column that the row does not have is a KeyError, as in any dict (or the default of `get`).
    """

    __slots__ = ("_missing",)

    def __init__(self, values: Mapping[str, Any], missing: Mapping[str, str] = _NO_REASONS) -> None:
        super().__init__(values)
        self._missing = missing

    @property
    def missing(self) -> Mapping[str, str]:
        """Columns whose value did not come and is not to be had, with the reason in words."""
        return self._missing

    def __missing__(self, column: str) -> Value:
        if column in self._missing:
            raise MissingValueError(column, self._missing[column])
        raise KeyError(column)

    def get(self, column: str, default: Value = None) -> Value:
        """Give the value, or the default where the row has no such column.

        Raises:
            MissingValueError: the row has the column, but its value is missing.
        """
        if column in self:
            return self[column]
        if column in self._missing:
            raise MissingValueError(column, self._missing[column])
        return default


class RowSource(Protocol):
    """What a change's rows are loaded by during a call."""

    async def row(self, change: "Change", model: type[Any]) -> Value:
        """Give the row of the change."""
        ...

    async def related(self, change: "Change", attribute: "InstrumentedAttribute[Any]") -> Value:
        """Give what belongs to the row of the change."""
        ...


ROWS_OF_CALL: Final[ContextVar[RowSource | None]] = ContextVar("tailrace_rows_of_call", default=None)
"""Set while a handler is called: its changes know no session, and are the same in every call."""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One committed row operation, with Python values of the columns' types.

    Attributes:
        position: where it stands in its lane.
        schema: schema of the table.
        table: name of the table; of a partition, its own.
        type: INSERT, UPDATE, DELETE, or TRUNCATE for handlers that ask for it.
        record: the new row; None for DELETE and TRUNCATE.
        old_record: the old row as far as the replica identity carries it; None for INSERT and TRUNCATE.
        key: values of the primary key, in its order; empty where the change does not carry it (TRUNCATE).
        commit_timestamp: when its transaction committed, in milliseconds; equal for all of its changes.
        source: where it comes from.
        attempt: which run of the handler this is, from 1.
        repaired: columns of `record` that were read again from the database, so as they are now.
        missing: columns of the row whose values are not to be had: asking `record` for one (for DELETE,
            `old_record`) raises MissingValueError.
        unchanged: columns that the source left out because the UPDATE did not touch them.
    """

    position: Position
    schema: str
    table: str
    type: ChangeType
    record: Record | None = None
    old_record: Record | None = None
    key: tuple[Any, ...] = ()
    commit_timestamp: dt.datetime | None = None
    source: ChangeSource = "realtime"
    attempt: int = 1
    repaired: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    unchanged: frozenset[str] = frozenset()

    def changed(self, column: str) -> bool:
        """Tell whether this change gave the column another value. Always true of INSERT, DELETE and TRUNCATE.

        Raises:
            MissingValueError: the old value is not known; for most columns that needs REPLICA IDENTITY FULL.
            KeyError: the table has no such column.
        """
        if self.type != "UPDATE" or self.record is None or self.old_record is None:
            return True
        if column in self.unchanged:
            return False
        old, new = self.old_record[column], self.record[column]
        # NaN equals itself in Postgres.
        return bool(old != new) and not (old != old and new != new)  # noqa: PLR0124 - only NaN differs from itself

    def as_(self, model: builtins.type[ModelT]) -> ModelT:
        """Build a detached instance of a mapped class from the row (of DELETE, the old row).

        Columns that the model does not map are left out. An attribute whose value is missing, or that the row
        does not have, raises sqlalchemy.orm.exc.DetachedInstanceError when it is read.

        Raises:
            ValueError: a TRUNCATE has no row.
            MissingValueError: the row lacks a column of the model's primary key.
        """
        row = self.old_record if self.record is None else self.record
        if row is None:
            raise ValueError(
                f"a {self.type} of {self.schema}.{self.table} has no row to build {model.__name__} from"
            )
        return cast("ModelT", detached(model, row))

    async def row(self, model: builtins.type[ModelT]) -> ModelT | None:
        """Load the row as it is now, in the handler's session; None where there is none any more.

        The rows of all changes of the call are loaded together, when the first is asked for.

        Raises:
            ValueError: the model is of another table, or this is a TRUNCATE.
            SessionMisuse: no handler is being called.
        """
        return cast("ModelT | None", await _rows_of_call().row(self, model))

    async def related(self, attribute: "InstrumentedAttribute[RelatedT]") -> RelatedT | None:
        """Load what belongs to the row, such as `Order.items`; None where the row is not there any more.

        Loaded for all changes of the call together, as `row` does.

        Raises:
            ValueError: as `row`; or the attribute is no relationship.
            SessionMisuse: no handler is being called.
        """
        return cast("RelatedT | None", await _rows_of_call().related(self, attribute))


def _rows_of_call() -> RowSource:
    rows = ROWS_OF_CALL.get()
    if rows is None:
        raise SessionMisuse("rows of a change can be loaded during the handler's call only")
    return rows


@dataclass(frozen=True)
class Context:
    """What a handler may use besides its changes and its session.

    Attributes:
        redis: the worker's Redis connection. Nothing kept there is durable.
        log: logger, bound to handler, lane and position.
        idempotency_key: the same for every attempt at this change; for calls outside the database.
            None for derive handlers and batches, whose calls are cut anew each time.
        make_supabase: makes the client when a handler first asks for it.
    """

    redis: "Redis"
    log: "FilteringBoundLogger"
    idempotency_key: str | None
    make_supabase: Callable[[], "AsyncClient"]

    @cached_property
    def supabase(self) -> "AsyncClient":
        """The Supabase client with the service key: storage, auth admin. No part of the transaction."""
        return self.make_supabase()
