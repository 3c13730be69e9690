"""What a test has the application write: one row inserted, updated or deleted. Pure; rows.py does it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import inspect
from sqlalchemy.orm import Mapper

from worker.declarations import parse_table


@dataclass(frozen=True)
class Write:
    """One row operation."""

    type: Literal["INSERT", "UPDATE", "DELETE"]
    schema: str
    table: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """By column."""
    key: object = None
    """Of UPDATE and DELETE: the primary key's value, or a tuple of several in their order."""
    mapper: Mapper[Any] | None = None
    """Of the mapped class, if the write was made with one: its types are those of the values."""
    instance: object = None
    """Given the row's values afterwards."""


def insert(what: object, /, **values: Any) -> Write:  # noqa: ANN401 - of any column
    """Insert a row: `insert("orders", amount=3)`, `insert(Order, amount=3)` or `insert(Order(amount=3))`.

    An instance is given the whole row afterwards, with its key and what the database filled in.

    Args:
        what: "schema.table" ("table" for schema public), a mapped class, or an instance of one.
        **values: by column; with a class, by attribute.
    """
    write, instance_values = _of("INSERT", what, values)
    return Write(**{**write, "values": {**instance_values, **write["values"]}})


def update(what: object, key: object = None, /, **values: Any) -> Write:  # noqa: ANN401 - as above
    """Update a row: `update("orders", 7, status="paid")`, or `update(order, status="paid")`.

    Args:
        what: as for `insert`.
        key: value of the primary key, a tuple where it has several columns; not with an instance.
        **values: what to change.
    """
    return Write(**_keyed("UPDATE", what, key, values))


def delete(what: object, key: object = None, /) -> Write:
    """Delete a row: `delete("orders", 7)`, or `delete(order)`; see `update`."""
    return Write(**_keyed("DELETE", what, key, {}))


def _keyed(kind: str, what: object, key: object, values: Mapping[str, Any]) -> dict[str, Any]:
    write, _ = _of(kind, what, values)
    if write.get("instance") is None:
        if key is None:
            raise TypeError(
                f"which row? As in {kind.lower()}({what!r}, 7), with the value of the primary key"
            )
        return {**write, "key": key}
    if key is not None:
        raise TypeError(f"{kind.lower()} of an instance takes no key: it has its own")
    mapper: Mapper[Any] = write["mapper"]
    return {**write, "key": tuple(mapper.primary_key_from_instance(write["instance"]))}


def _of(kind: str, what: object, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find the table; returns the parts of a write, and the values that an instance has by itself."""
    if isinstance(what, str):
        schema, table = parse_table(what)
        return {"type": kind, "schema": schema, "table": table, "values": dict(values)}, {}
    model = what if isinstance(what, type) else type(what)
    mapper: Any = inspect(model, raiseerr=False)
    if not isinstance(mapper, Mapper):
        raise TypeError(f"{what!r} is no table's name, no mapped class and no instance of one")
    columns = {one.key: one.columns[0].name for one in mapper.column_attrs}
    if unknown := sorted(values.keys() - columns.keys()):
        raise TypeError(f"{model.__name__} has no column attribute {', '.join(unknown)}")
    local: Any = mapper.local_table
    parts = {
        "type": kind,
        "schema": local.schema or "public",
        "table": local.name,
        "values": {columns[name]: value for name, value in values.items()},
        "mapper": mapper,
    }
    if what is model:
        return parts, {}
    has = inspect(what).dict
    return {**parts, "instance": what}, {columns[name]: has[name] for name in columns if name in has}
