"""Changes the record of a change that is kept, as a person asked. Pure; whether it fits is judged elsewhere.

The edited payload is one that its source could have written: what reads it later knows no difference.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from worker.change import Column, LogChange, RawChange, RawSource
from worker.errors import Refused

_JSONS: Final = frozenset({"json", "jsonb"})
_encode: Final = msgspec.json.Encoder(decimal_format="number").encode
_log_decode: Final = msgspec.msgpack.Decoder(LogChange).decode
_log_encode: Final = msgspec.msgpack.Encoder().encode
_object: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class Edited(NamedTuple):
    """A change with another record."""

    payload: bytes
    before: Mapping[str, Any]
    """What the edited columns were, as the source wrote them: texts of Postgres, or JSON; null for none."""


def edit(
    source: RawSource, payload: bytes, values: Mapping[str, Any], stored: Mapping[str, str | None]
) -> Edited:
    """Give columns of the new row other values.

    Args:
        source: who wrote the payload.
        payload: of the change, with these columns in its new row (see `columns_of`).
        values: column -> value, as JSON has it.
        stored: the same as Postgres writes it.
    """
    record = RawChange.decode(source, payload).record or {}
    before = {name: readable(record.get(name)) for name in values}
    edited = _of_log(payload, stored) if source == "wal" else _of_realtime(payload, values)
    return Edited(edited, before)


def columns_of(raw: RawChange, names: Iterable[str]) -> dict[str, Column]:
    """Find the columns of a change that are to be edited.

    Raises:
        Refused: the change has no new row, or not such a column.
    """
    if raw.record is None:
        raise Refused(f"a {raw.type} of {raw.schema}.{raw.table} has no record to edit")
    columns = {column.name: column for column in raw.columns}
    unknown = sorted(set(names) - columns.keys())
    if unknown:
        raise Refused(f'{raw.schema}.{raw.table} had no column "{unknown[0]}" when the change was written')
    return {name: columns[name] for name in names}


def _of_log(payload: bytes, stored: Mapping[str, str | None]) -> bytes:
    log = _log_decode(payload)
    record = list(log.record or ())
    for at, column in enumerate(RawChange.of_log(log, payload).columns):
        if column.name in stored:
            text = stored[column.name]
            record[at] = None if text is None else text.encode()
    return _log_encode(msgspec.structs.replace(log, record=record))


def _of_realtime(payload: bytes, values: Mapping[str, Any]) -> bytes:
    data = _object(payload)
    record = _object(data["record"])
    for name, value in values.items():
        record[name] = msgspec.Raw(_encode(value))
    data["record"] = msgspec.Raw(msgspec.json.encode(record))
    return msgspec.json.encode(data)


def as_text(column: Column, value: object) -> str | None:
    """Give the text by which Postgres reads a JSON value as one of the column's type; None for NULL.

    Raises:
        Refused: lists and objects are values of json columns only; arrays have a text of their own.
    """
    if value is None:
        return None
    if column.type in _JSONS:
        return _encode(value).decode()
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        raise Refused(
            f'the value for "{column.name}" must be a text, a number, true, false or null; write an array as'
            ' Postgres does: "{1,2}"'
        )
    return str(value)


def readable(value: object) -> Any:  # noqa: ANN401 - whatever JSON has
    """Give a value as it came from its source for people to read."""
    if isinstance(value, msgspec.Raw):
        return msgspec.json.decode(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else value
