"""Instances of mapped classes with all that their columns demand: a test names only what it is about."""

import datetime as dt
import enum
import itertools
from decimal import Decimal
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

from sqlalchemy import ARRAY, JSON, Column, Enum, Numeric, String, inspect
from sqlalchemy.orm import Mapper

ModelT = TypeVar("ModelT")

_FIRST_DAY: Final = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)


class Factory(Generic[ModelT]):
    """Makes instances of one mapped class; `factory` makes it."""

    def __init__(self, model: type[ModelT], given: dict[str, Any]) -> None:
        mapper = inspect(model, raiseerr=False)
        if not isinstance(mapper, Mapper):
            raise TypeError(f"{model!r} is no class mapped by SQLAlchemy")
        self._model = model
        self._given = given
        self._numbers = itertools.count(1)
        self._wanted: dict[str, Column[Any]] = {
            attribute.key: column
            for attribute in mapper.column_attrs
            if isinstance(column := attribute.columns[0], Column) and _is_wanted(column)
        }

    def __call__(self, **values: Any) -> ModelT:  # noqa: ANN401 - of any attribute
        """Make an instance, with these values of its attributes.

        Raises:
            ValueError: a column refers to another table's row, or has a type without an obvious value.
        """
        number = next(self._numbers)
        values = {**self._given, **values}
        for name, column in self._wanted.items():
            if name not in values:
                values[name] = self._plausible(name, column, number)
        return self._model(**values)

    def _plausible(self, name: str, column: Column[Any], number: int) -> object:
        model = self._model.__name__
        for reference in column.foreign_keys:
            raise ValueError(f"{model}.{name} refers to {reference.target_fullname}: give it a value")
        try:
            return _value(column, number)
        except (NotImplementedError, KeyError):
            raise ValueError(f"{model}.{name} has type {column.type!r}: give it a value") from None


def factory(model: type[ModelT], **given: Any) -> Factory[ModelT]:  # noqa: ANN401 - of any attribute
    """Make something to call for instances of a class, as often as they are wanted.

    Columns that must have a value, and that neither the database nor the model fills in, get a plausible one
    of their type, a new one each time. What may be null stays unset.

    Args:
        model: a mapped class.
        **given: values that all of its instances have, unless a call says otherwise.
    """
    return Factory(model, given)


def _is_wanted(column: Column[Any]) -> bool:
    filled = column.default is not None or column.server_default is not None
    filled = filled or column.identity is not None or column.computed is not None
    return not column.nullable and not filled and column is not column.table._autoincrement_column  # noqa: SLF001 - it has no other


def _value(column: Column[Any], number: int) -> object:
    type_ = column.type
    if isinstance(type_, Enum):
        return next(iter(type_.enum_class)) if type_.enum_class else type_.enums[0]
    if isinstance(type_, (JSON, ARRAY)):
        return [] if isinstance(type_, ARRAY) else {}
    kind: type[Any] = type_.python_type
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    if isinstance(type_, String) and kind is str:
        return f"{column.name}-{number}"[-(type_.length or 1_000) :]
    if isinstance(type_, Numeric) and kind is Decimal:
        whole = (type_.precision or 10) - (type_.scale or 0)
        return Decimal(number % 10 ** max(1, min(whole, 9)))
    moment = _FIRST_DAY + dt.timedelta(seconds=number)
    values: dict[type[Any], object] = {
        bool: False,
        int: number % 32_768,
        float: float(number),
        str: f"{column.name}-{number}",
        bytes: b"%d" % number,
        Decimal: Decimal(number),
        UUID: UUID(int=number),
        dt.datetime: moment if getattr(type_, "timezone", True) else moment.replace(tzinfo=None),
        dt.date: moment.date(),
        dt.time: moment.time(),
        dt.timedelta: dt.timedelta(seconds=number),
    }
    return values[kind]
