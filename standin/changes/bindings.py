"""What a client asks for: one binding, its id, and the texts that refuse it.

Pure: nothing here knows the database. Whether the tables and columns exist is decided in
`standin.changes.subscribing`.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# TRUNCATE may be asked for, but never comes.
EVENTS = ("INSERT", "UPDATE", "DELETE", "TRUNCATE")
ANY = "*"
# The real server's ids are below 2**27; clients may rely on a small integer.
ID_BITS = 27


class BadSubscription(Exception):  # noqa: N818 - the name is part of the interface and says what it is
    """A subscription that the server refuses; `str()` is the message of its `system` error frame."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One entry of `postgres_changes`, normalised.

    Attributes:
        event: `INSERT`, `UPDATE`, `DELETE`, `TRUNCATE` or `*`; whatever else was sent becomes `*`.
        schema: LIKE pattern of the schema, or `*` for all.
        table: LIKE pattern of the table; None (or `*`) for all.
        filter: the filter as sent, or None.
        select: names of the columns wanted, or None for all.
    """

    event: str
    schema: str
    table: str | None
    filter: str | None
    select: tuple[str, ...] | None

    def matches_event(self, event: str) -> bool:
        """Tell whether a change of type `event` is wanted."""
        return self.event in (ANY, event)


def binding_id(binding: Binding) -> int:
    """Return the id of a binding: equal bindings have equal ids, on every connection and in every process."""
    parts = (
        binding.event,
        binding.schema,
        _marked(binding.table),
        _marked(binding.filter),
        "" if binding.select is None else "s" + "\x1e".join(binding.select),
    )
    text = "\x1f".join(parts)
    return zlib.crc32(text.encode()) & ((1 << ID_BITS) - 1)


def _marked(value: str | None) -> str:
    # None and "" must not share an id.
    return "" if value is None else "=" + value


def parse_binding(params: Mapping[str, Any]) -> Binding:
    """Return the binding that a client's `params` mean.

    Raises:
        BadSubscription: if they mean none; the text is the real server's.
    """
    select = _select(params.get("select"))
    schema, table, filter_ = params.get("schema"), params.get("table"), params.get("filter")
    for key in ("schema", "table", "filter"):
        if key in params and not isinstance(params[key], str):
            raise _nothing_asked(params)
    if (schema is None and table is None) or (filter_ is not None and (schema is None or table is None)):
        raise _nothing_asked(params)
    event = str(params.get("event")).upper()
    binding = Binding(
        event=event if event in EVENTS else ANY,
        schema="public" if schema is None else schema,
        table=table,
        filter=filter_,
        select=select,
    )
    refuse_wildcard_select(binding)
    return binding


def refuse_wildcard_select(binding: Binding) -> None:
    """Raise BadSubscription if columns are selected without naming one table."""
    if binding.select is not None and (binding.table in (None, ANY) or binding.schema == ANY):
        raise BadSubscription(
            "Column selection is not supported for wildcard subscriptions. "
            "Provide an explicit schema and table name."
        )


def _select(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value) or None
    raise BadSubscription(
        'Error parsing `select` params: expected a list of column name strings, e.g. select: ["col1", "col2"]'
    )


def _nothing_asked(params: Mapping[str, Any]) -> BadSubscription:
    return BadSubscription(
        "No subscription params provided. Please provide at least a `schema` or `table` to subscribe to: "
        + inspect(params)
    )


def inspect(value: object) -> str:
    """Return `value` as the real server (written in Elixir) prints it, on one line."""
    if value is None or isinstance(value, bool):
        return {None: "nil", True: "true", False: "false"}[value]
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("#{", "\\#{")
        for raw, shown in (("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
            escaped = escaped.replace(raw, shown)
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "%{" + ", ".join(f"{inspect(k)} => {inspect(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        opening, closing = "[]" if isinstance(value, list) else "{}"
        return opening + ", ".join(map(inspect, value)) + closing
    return str(value)


LINE_WIDTH = 80


def inspect_list(items: list[Any]) -> str:
    """Return a list of tuples or strings as the real server prints it, broken beyond 80 columns."""
    flat = inspect(items)
    if len(flat) <= LINE_WIDTH:
        return flat
    return "[\n  " + ",\n  ".join(_filled(item) for item in items) + "\n]"


def _filled(item: object) -> str:
    flat = inspect(item)
    if not isinstance(item, tuple) or len(flat) + 2 <= LINE_WIDTH:
        return flat
    lines, line = [], "{"
    for position, part in enumerate(item):
        text = inspect(part) + ("}" if position == len(item) - 1 else ",")
        glued = line + ("" if position == 0 else " ") + text
        if position and len(glued) + 2 > LINE_WIDTH:
            lines.append(line)
            line = " " + text
        else:
            line = glued
    return "\n  ".join([*lines, line])
