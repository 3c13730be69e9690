"""Rows to instances of mapped classes, without a session and without a statement.

The values are already typed as asyncpg gives them; what a mapped type adds on top (Python enums,
TypeDecorators, SQLAlchemy's ranges) is applied as SQLAlchemy itself would on loading.
"""

from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final
from weakref import WeakKeyDictionary

from sqlalchemy import inspect, types
from sqlalchemy.dialects.postgresql import asyncpg
from sqlalchemy.orm import Mapper, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from worker.values.scalars import Value

_DIALECT: Final = asyncpg.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy leaves dialects untyped
_OID_OF: Final[dict[type, int]] = {Decimal: 1700, float: 701}

Processor = Callable[[Any], Any]
# (attribute, column, what is left to do to the value) of each mapped column.
_Attributes = tuple[tuple[str, str, Processor | None], ...]
_attributes_of: Final[WeakKeyDictionary[type[Any], _Attributes]] = WeakKeyDictionary()


def detached(model: type[Any], row: Mapping[str, Any]) -> Value:
    """Build a detached instance of a mapped class from a row, by column name.

    Raises:
        MissingValueError: from the row, when it misses a column of the primary key.
        KeyError: the row does not have a column of the primary key.
    """
    mapper: Mapper[Any] = inspect(model)
    for column in mapper.primary_key:
        row[column.name]
    instance = mapper.class_manager.new_instance()
    for key, name, processor in _attributes(model):
        if name in row:
            value = row[name]
            set_committed_value(instance, key, value if processor is None else processor(value))
    make_transient_to_detached(instance)
    return instance


def _attributes(model: type[Any]) -> _Attributes:
    known = _attributes_of.get(model)
    if known is not None:
        return known
    mapper: Mapper[Any] = inspect(model)
    known = _attributes_of[model] = tuple(
        (attribute.key, column.name, _processor(column.type))
        for attribute in mapper.column_attrs
        for column in attribute.columns[:1]
        if hasattr(column, "name")
    )
    return known


def _processor(mapped: types.TypeEngine[Any]) -> Processor | None:
    """Give what SQLAlchemy would do to a loaded value, or None for nothing."""
    inner = mapped.impl_instance if isinstance(mapped, types.TypeDecorator) else mapped
    if isinstance(inner, types.Numeric):
        return lambda value: _numeric(mapped, value)
    return _bound(mapped, None)


def _numeric(mapped: types.TypeEngine[Any], value: Value) -> Value:
    # The processor depends on what the database sends: an exact number or a float.
    processor = _bound(mapped, _OID_OF.get(type(value), _OID_OF[Decimal]))
    return value if processor is None else processor(value)


def _bound(mapped: types.TypeEngine[Any], oid: int | None) -> Processor | None:
    processor: Processor | None = mapped.dialect_impl(_DIALECT).result_processor(_DIALECT, oid)
    return processor
