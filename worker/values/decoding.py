"""Wire values to Python values: which decoder a column type has, in each of the two forms of the wire.

"json" is Realtime's rendering (to_jsonb with its deviations), "text" is Postgres's text output. A decoder
never raises on what Postgres writes, nor on a value of another type (the table was altered since the change):
what the type does not explain is given as it was written. Types without a decoder are for Postgres to read
(database).
"""

import datetime as dt
import functools
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final, Literal
from uuid import UUID

import msgspec

from worker.values.arrays import parse_array
from worker.values.scalars import (
    FLOATS,
    INTEGERS,
    JSONS,
    PARSERS,
    TEXTS,
    Parser,
    Value,
    parse_bytea,
    parse_float4,
    parse_json,
    parse_timestamptz,
)

Form = Literal["json", "text"]
Decoder = Callable[[bytes], Value]
RowDecoder = Callable[[bytes], dict[str, Value]]

# Everything by which a decoder may refuse a value that its type does not explain. RecursionError: json nested
# deeper than Python reads.
UNREADABLE: Final = (msgspec.MsgspecError, ValueError, ArithmeticError, TypeError, RecursionError)

_string: Final = msgspec.json.Decoder(str).decode
_text_or_null: Final = msgspec.json.Decoder(str | None).decode
_float_or_null: Final = msgspec.json.Decoder(float | None).decode
_moment_or_null: Final = msgspec.json.Decoder(dt.datetime | None).decode
_pieces: Final = msgspec.json.Decoder(list[msgspec.Raw] | None).decode
_string_map: Final = msgspec.json.Decoder(dict[str, str | None] | None).decode


def decoder(type_name: str, form: Form) -> Decoder | None:
    """Give the decoder of a type, or None where only Postgres can read it.

    Args:
        type_name: pg_type.typname, "_int4" for arrays; for domains and enums the `value_type` of the
            catalogue.
        form: "json" takes the JSON text of one value (bytes or msgspec.Raw), "text" Postgres's text output.

    Returns:
        A function that does not raise: NULL (None in the text form) is None, an unreadable value comes as
        written.
    """
    return _decoder(type_name, form)


@functools.cache
def _decoder(type_name: str, form: Form) -> Decoder | None:
    if form == "text":
        parser = text_parser(type_name)
        return None if parser is None else functools.partial(_decode_text, parser)
    strict = strict_decoder(type_name)
    return None if strict is None else functools.partial(_decode_json, strict, text_parser(type_name))


def text_parser(type_name: str) -> Parser | None:
    """Give the parser of a type's text (it raises on other text), or None where only Postgres can read it."""
    if type_name.startswith("_"):
        element = PARSERS.get(type_name[1:])
        return None if element is None else functools.partial(parse_array, element=element)
    return PARSERS.get(type_name)


@functools.cache
def strict_decoder(type_name: str) -> Decoder | None:
    """Give the fast decoder of the json form; it raises UNREADABLE where `decoder` takes a second look."""
    if type_name in _STRICT:
        return _STRICT[type_name]
    if type_name == "hstore":
        return _string_map
    if type_name.startswith("_"):
        element = strict_decoder(type_name[1:])
        if element is None or type_name == "_hstore":
            return None
        # An array of json holds arrays that are values: one parse reads them and further dimensions alike.
        return element if type_name[1:] in JSONS else _array_decoder(type_name[1:])
    if type_name in PARSERS:
        return functools.partial(_parse_string, PARSERS[type_name])
    return None


def _array_decoder(element: str) -> Decoder:
    one = decoder(element, "json")
    if one is None:  # pragma: no cover - the caller has asked for the element's strict decoder
        raise ValueError(element)

    def decode(raw: bytes) -> list[Value] | None:
        pieces = _pieces(raw)
        if pieces is None:
            return None
        return [decode(piece) if bytes(piece)[:1] == b"[" else one(piece) for piece in pieces]

    return decode


def _decode_text(parser: Parser, raw: bytes | None) -> Value:
    if raw is None:
        return None
    text = str(raw, "utf-8")
    try:
        return parser(text)
    except UNREADABLE:
        return text


def _decode_json(strict: Decoder, parser: Parser | None, raw: bytes) -> Value:
    try:
        return strict(raw)
    except UNREADABLE:
        return _as_written(parser, raw)


def _as_written(parser: Parser | None, raw: bytes) -> Value:
    """Read what the strict decoder refused: by its text (infinity, NaN), else as JSON, else as text."""
    data = bytes(raw)
    text = _string(data) if data[:1] == b'"' else data.decode()
    try:
        if parser is not None and data[:1] not in b"[{":
            return parser(text)
        return parse_json(text)
    except UNREADABLE:
        return text


def row_decoder(types: Mapping[str, str], *, whole: bool) -> RowDecoder | None:
    """Give a function that reads all values of a row (a JSON object) in one go; None where that cannot be.

    It raises UNREADABLE where one of the columns' strict decoders does, or for a column that it does not
    know, and otherwise gives what those give.

    Args:
        types: for each column the name of its type, as for `strict_decoder`.
        whole: it also raises where a column is not there; otherwise that one is left out.
    """
    forms: list[tuple[str, Callable[[Any], Value]]] = []
    fields: list[Any] = []
    for number, (name, type_name) in enumerate(types.items()):
        known = _FIELDS.get(type_name)
        if known is None and (strict := strict_decoder(type_name)) is not None:
            known = (msgspec.Raw, strict)
        if known is None:
            return None
        kind, form = known
        fields.append((f"c{number}", kind) if whole else (f"c{number}", kind, msgspec.UNSET))
        if form is not None:
            forms.append((name, form))
    called = {f"c{number}": name for number, name in enumerate(types)}
    try:
        row = msgspec.defstruct("Row", fields, rename=called, forbid_unknown_fields=True, gc=False)
    except ValueError:
        return None  # msgspec takes no name that JSON writes in another way
    read = msgspec.json.Decoder(row).decode
    return functools.partial(_read_row, read, tuple(types), tuple(forms), whole)


def _read_row(
    read: Callable[[bytes], msgspec.Struct],
    names: Sequence[str],
    forms: Sequence[tuple[str, Callable[[Any], Value]]],
    whole: bool,  # noqa: FBT001 - given once, by position
    raw: bytes,
) -> dict[str, Value]:
    row = dict(zip(names, msgspec.structs.astuple(read(raw)), strict=True))
    if not whole:
        row = {name: value for name, value in row.items() if value is not msgspec.UNSET}
    for name, form in forms:
        if name in row:
            row[name] = form(row[name])
    return row


def quick_text(type_name: str) -> Decoder | None:
    """Give the fast decoder of the text form; it raises UNREADABLE where `decoder` gives another value."""
    if type_name in _QUICK_TEXT:
        return _QUICK_TEXT[type_name]
    parser = text_parser(type_name)
    return None if parser is None else functools.partial(_parse_bytes, parser)


def _parse_bytes(parser: Parser, raw: bytes) -> Value:
    return parser(str(raw, "utf-8"))


def written_value(raw: bytes) -> Value:
    """Give a json value of a type that nothing explains: strings as str, anything else parsed."""
    return None if bytes(raw) == b"null" else _as_written(None if bytes(raw)[:1] != b'"' else str, raw)


def _parse_string(parser: Parser, raw: bytes) -> Value:
    text = _text_or_null(raw)
    return None if text is None else parser(text)


def _decode_float4(raw: bytes) -> float | None:
    return _single(_float_or_null(raw))


def _single(value: float | None) -> float | None:
    return None if value is None else parse_float4(repr(value))


def _decode_bytea(raw: bytes) -> bytes | None:
    text = _text_or_null(raw)
    return None if text is None else parse_bytea(text)


def _decode_timestamptz(raw: bytes) -> dt.datetime | None:
    return _in_utc(_moment_or_null(raw))


def _in_utc(moment: dt.datetime | None) -> dt.datetime | None:
    # Realtime renders in the time zone that the database sets; UTC is what asyncpg gives.
    if moment is None or moment.tzinfo is dt.UTC or moment.tzinfo is None:
        return moment
    return moment.astimezone(dt.UTC)


def _text_in_utc(raw: bytes) -> Value:
    text = raw.decode()
    moment = dt.datetime.fromisoformat(text)
    return moment if moment.tzinfo is dt.UTC else parse_timestamptz(text)


def _text_moment(raw: bytes) -> dt.datetime:
    return dt.datetime.fromisoformat(raw.decode())


def _parse_any(raw: bytes) -> Value:
    return parse_json(str(raw, "utf-8"))


_STRICT: Final[dict[str, Decoder]] = {
    # oid and xid come as JSON strings: strict=False reads both.
    **dict.fromkeys(INTEGERS, msgspec.json.Decoder(int | None, strict=False).decode),
    **dict.fromkeys(("int2", "int4", "int8"), msgspec.json.Decoder(int | None).decode),
    **dict.fromkeys(TEXTS, _text_or_null),
    **dict.fromkeys(JSONS, _parse_any),
    **dict.fromkeys(FLOATS, _float_or_null),
    "float4": _decode_float4,
    "numeric": msgspec.json.Decoder(Decimal | None).decode,
    "bool": msgspec.json.Decoder(bool | None).decode,
    "uuid": msgspec.json.Decoder(UUID | None).decode,
    "bytea": _decode_bytea,
    "date": msgspec.json.Decoder(dt.date | None).decode,
    "timestamp": _moment_or_null,
    "timestamptz": _decode_timestamptz,
    "time": msgspec.json.Decoder(dt.time | None).decode,
    "timetz": msgspec.json.Decoder(dt.time | None).decode,
}

# The types that msgspec reads as they are, or nearly: then what makes the value of what it read.
_FIELDS: Final[dict[str, tuple[Any, Callable[[Any], Value] | None]]] = {
    **dict.fromkeys(("int2", "int4", "int8"), (int | None, None)),
    **dict.fromkeys(TEXTS, (str | None, None)),
    "float8": (float | None, None),
    "float4": (float | None, _single),
    "numeric": (Decimal | None, None),
    "bool": (bool | None, None),
    "uuid": (UUID | None, None),
    "date": (dt.date | None, None),
    "timestamp": (dt.datetime | None, None),
    "timestamptz": (dt.datetime | None, _in_utc),
    "time": (dt.time | None, None),
    "timetz": (dt.time | None, None),
}
_QUICK_TEXT: Final[dict[str, Decoder]] = {
    **dict.fromkeys(INTEGERS, int),
    **dict.fromkeys(TEXTS, bytes.decode),
    "float8": float,
    "numeric": msgspec.json.Decoder(Decimal).decode,  # NaN and infinities are refused
    "timestamp": _text_moment,
    "timestamptz": _text_in_utc,
}
