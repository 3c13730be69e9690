"""A change as handlers see it: typed, frozen, the same in every call.

It knows nothing of where changes come from or go to, and is made of a raw one (raw.py) by rows/repair.py.
"""

import builtins
import datetime as dt
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypeVar, cast, overload

import msgspec
import typing_extensions

from worker.context import Context
from worker.errors import MissingValueError, SessionMisuse
from worker.instances import detached
from worker.raw import (
    ChangeType,
    Column,
    Given,
    LogChange,
    LogValue,
    Position,
    RawChange,
    RawSource,
    encode_columns,
)
from worker.values.scalars import Value

if TYPE_CHECKING:
    from sqlalchemy.orm import InstrumentedAttribute

__all__ = [
    "ROWS_OF_CALL",
    "Change",
    "ChangeSource",
    "ChangeType",
    "Column",
    "Context",
    "Given",
    "LogChange",
    "LogValue",
    "Position",
    "RawChange",
    "RawSource",
    "Record",
    "RowSource",
    "encode_columns",
]

# `Change` alone is a change of any table, `Change[Order]` one whose row is an Order.
RowT = typing_extensions.TypeVar("RowT", default=Any)
ModelT = TypeVar("ModelT")
RelatedT = TypeVar("RelatedT")

ChangeSource = Literal["wal", "realtime", "backfill", "redrive"]

_NO_REASONS: Final[Mapping[str, str]] = {}


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


class Change(msgspec.Struct, Generic[RowT], frozen=True, kw_only=True):
    """One committed row operation, with Python values of the columns' types.

    A handler that annotates `Change[Order]` says which model the row has: then `as_()`, `old_as()` and
    `row()` give instances of it without being told.

    Attributes:
        position: where it stands in its lane.
        schema: schema of the table.
        table: name of the table; of a partition, its own.
        type: INSERT, UPDATE, DELETE, or TRUNCATE for handlers that ask for it.
        record: the new row; None for DELETE and TRUNCATE.
        old_record: the old row as far as the replica identity carries it; None for INSERT and TRUNCATE.
        key: values of the primary key, in its order; empty where the change does not carry it (TRUNCATE).
        commit_timestamp: when its transaction committed, in milliseconds; equal for all of its changes.
        source: where it comes from; of a `backfill`, the row was there and comes as an INSERT, as it was when
            its page was read.
        attempt: which run of the handler this is, from 1.
        repaired: columns of `record` that were read again from the database, so as they are now.
        missing: columns of the row whose values are not to be had: asking `record` for one (for DELETE,
            `old_record`) raises MissingValueError.
        unchanged: columns that the source left out because the UPDATE did not touch them.
        model: what the handler has annotated, as in `Change[Order]`; None where it has not.
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
    model: builtins.type[Any] | None = None

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

    @overload
    def as_(self, model: builtins.type[ModelT]) -> ModelT: ...
    @overload
    def as_(self) -> RowT: ...
    def as_(self, model: builtins.type[Any] | None = None) -> Any:
        """Build a detached instance of a mapped class from the row (of DELETE, the old row).

        Columns that the model does not map are left out. An attribute whose value is missing, or that the row
        does not have, raises sqlalchemy.orm.exc.DetachedInstanceError when it is read.

        Args:
            model: the class; without, the one that the handler has annotated.

        Raises:
            ValueError: a TRUNCATE has no row; or no model is named.
            MissingValueError: the row lacks a column of the model's primary key.
        """
        model = self._named(model)
        row = self.old_record if self.record is None else self.record
        if row is None:
            raise ValueError(
                f"a {self.type} of {self.schema}.{self.table} has no row to build {model.__name__} from"
            )
        return detached(model, row)

    @overload
    def old_as(self, model: builtins.type[ModelT]) -> ModelT | None: ...
    @overload
    def old_as(self) -> RowT | None: ...
    def old_as(self, model: builtins.type[Any] | None = None) -> Any:
        """Build a detached instance from the old row, as `as_` does; None where nothing is known of it.

        What of the old row is known, the replica identity decides.

        Raises:
            ValueError: no model is named.
            MissingValueError: the old row lacks a column of the model's primary key.
        """
        model = self._named(model)
        return None if self.old_record is None else detached(model, self.old_record)

    @overload
    async def row(self, model: builtins.type[ModelT]) -> ModelT | None: ...
    @overload
    async def row(self) -> RowT | None: ...
    async def row(self, model: builtins.type[Any] | None = None) -> Any:
        """Load the row as it is now, in the handler's session; None where there is none any more.

        The rows of all changes of the call are loaded together, when the first is asked for.

        Raises:
            ValueError: the model is of another table, or none is named, or this is a TRUNCATE.
            SessionMisuse: no handler is being called.
        """
        return await _rows_of_call().row(self, self._named(model))

    async def related(self, attribute: "InstrumentedAttribute[RelatedT]") -> RelatedT | None:
        """Load what belongs to the row, such as `Order.items`; None where the row is not there any more.

        Loaded for all changes of the call together, as `row` does.

        Raises:
            ValueError: as `row`; or the attribute is no relationship.
            SessionMisuse: no handler is being called.
        """
        return cast("RelatedT | None", await _rows_of_call().related(self, attribute))

    def _named(self, model: builtins.type[Any] | None) -> builtins.type[Any]:
        named = model or self.model
        if named is None:
            raise ValueError(
                f"of which model is the row of {self.schema}.{self.table}? Name it, as in as_(Order), or"
                " annotate the handler's parameter with it, as in Change[Order]"
            )
        return named


def _rows_of_call() -> RowSource:
    rows = ROWS_OF_CALL.get()
    if rows is None:
        raise SessionMisuse("rows of a change can be loaded during the handler's call only")
    return rows
