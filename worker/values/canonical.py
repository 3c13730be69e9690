"""The canonical text of a value: equal values of a type have equal text, whatever the wire made of them.

Lane keys are made of these texts, so they must never change between versions. Each is readable by the input
function of its type. Types that Python does not read keep Postgres's own text, which is canonical for most of
them (ranges, geometry), but not by definition. Equality is Postgres's: 1.0 = 1.00, '1 day' = '24 hours',
jsonb by value; text is compared byte by byte, whatever the collation.
"""

import datetime as dt
import functools
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Final

import msgspec

from worker.values.arrays import format_array, parse_array
from worker.values.decoding import UNREADABLE, Form, text_parser
from worker.values.scalars import (
    INTEGERS,
    JSONS,
    TEXTS,
    Parser,
    Value,
    interval_parts,
    parse_bool,
    parse_bytea,
    parse_float4,
)

# Of one value as it came: bytes or msgspec.Raw; in the text form also None.
Canonicalizer = Callable[[Value], str | None]

_string: Final = msgspec.json.Decoder(str).decode
_pieces: Final = msgspec.json.Decoder(list[msgspec.Raw]).decode
_exact: Final = msgspec.json.Decoder(float_hook=Decimal)
_MICROSECONDS_OF_DAY: Final = 86_400_000_000


def canonical(value_json: bytes, type_name: str) -> str | None:
    """Give the canonical text of a wire value (json form), or None for NULL.

    Args:
        value_json: the JSON text of one value, bytes or msgspec.Raw.
        type_name: pg_type.typname; for domains and enums the `value_type` of the catalogue.
    """
    return canonicalizer(type_name)(value_json)


def canonicalizer(type_name: str, form: Form = "json") -> Canonicalizer:
    """Give the function behind `canonical` for one type; for the hot path of routing.

    Both forms of a value have the same canonical text, but for composites and hstore, which json writes as
    objects: whoever makes keys for one handler uses the form of its source (see kept_keys.py). Changing the
    delivery begins all lanes anew, and with them such keys. The text form takes None for NULL.
    """
    return _of_text(type_name) if form == "text" else _of_json(type_name)


@functools.cache
def _of_text(type_name: str) -> Canonicalizer:
    form = _text_form(type_name)

    def canonicalize(raw: bytes | None) -> str | None:
        return None if raw is None else form(str(raw, "utf-8"))

    return canonicalize


def _text_form(type_name: str) -> Callable[[str], str | None]:
    """Give the function from Postgres's text of a value to the canonical one."""
    if type_name in {"_json", "_jsonb"}:
        return _json_array
    if type_name in JSONS:
        return lambda text: _json(text.strip().encode())
    if type_name.startswith("_"):
        return functools.partial(_text_array, _text_form(type_name[1:]))
    form = _FORMS.get(type_name)
    return str if form is None else functools.partial(_formed, form)


def _text_array(element: Callable[[str], str | None], text: str) -> str:
    try:
        return format_array(parse_array(text, element))
    except UNREADABLE:
        return text


def _json_array(text: str) -> str:
    """Write an array of documents as one document, which is how the json form has it."""
    try:
        return _canonical_json(parse_array(text, _exact.decode))
    except UNREADABLE:
        return text


@functools.cache
def _of_json(type_name: str) -> Canonicalizer:
    if type_name in INTEGERS:
        return _integer
    if type_name in JSONS or type_name in {"_json", "_jsonb"}:
        return _json
    if type_name.startswith("_"):
        return functools.partial(_array, _of_json(type_name[1:]))
    if type_name in TEXTS - {"citext", "bpchar"}:
        return _text
    return functools.partial(_scalar, _FORMS.get(type_name, str))


def from_canonical(text: str, type_name: str) -> Value:
    """Give the Python value of a canonical text, or the text itself for types that Python does not read."""
    parser = _reader(type_name)
    try:
        return text if parser is None else parser(text)
    except UNREADABLE:
        return text


@functools.cache
def _reader(type_name: str) -> Callable[[str], Value] | None:
    if type_name in {"_json", "_jsonb"}:
        return text_parser("jsonb")
    return _from_interval if type_name == "interval" else text_parser(type_name)


def _from_interval(text: str) -> dt.timedelta:
    days, _, microseconds, _ = text.split(" ")
    return dt.timedelta(days=int(days), microseconds=int(microseconds))


def _integer(raw: bytes) -> str | None:
    # Postgres writes integers canonically; only the quotes of an oid differ.
    text = str(raw, "ascii")
    return None if text == "null" else text.strip('"')


def _text(raw: bytes) -> str | None:
    data = bytes(raw)
    if data[:1] == b'"':
        return _string(data)
    return None if data == b"null" else data.decode()


def _scalar(form: Callable[[str], str], raw: bytes) -> str | None:
    text = _text(raw)
    return None if text is None else _formed(form, text)


def _formed(form: Callable[[str], str], text: str) -> str:
    try:
        return form(text)
    except UNREADABLE:
        return text


def _json(raw: bytes) -> str | None:
    data = bytes(raw)
    try:
        return None if data == b"null" else _canonical_json(_exact.decode(data))
    except UNREADABLE:
        return data.decode()


def _canonical_json(value: Value) -> str:
    if isinstance(value, dict):
        members = (f"{_quote(key)}:{_canonical_json(value[key])}" for key in sorted(value))
        return "{" + ",".join(members) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_canonical_json, value)) + "]"
    if isinstance(value, (Decimal, int)) and not isinstance(value, bool):
        return _numeric(str(value))
    return _quote(value)


def _quote(value: str | bool | None) -> str:  # noqa: FBT001 - a JSON scalar
    return msgspec.json.encode(value).decode()


def _array(element: Canonicalizer, raw: bytes) -> str | None:
    if bytes(raw) == b"null":
        return None

    def dimension(pieces: list[msgspec.Raw]) -> list[Value]:
        return [dimension(_pieces(p)) if bytes(p)[:1] == b"[" else element(bytes(p)) for p in pieces]

    try:
        return format_array(dimension(_pieces(raw)))
    except UNREADABLE:
        return _text(raw)


def _numeric(text: str) -> str:
    number = Decimal(text)
    if not number.is_finite():
        return "NaN" if number.is_nan() else "Infinity" if number > 0 else "-Infinity"
    digits = f"{number:f}"
    if "." in digits:
        digits = digits.rstrip("0").rstrip(".")
    return "0" if digits in {"-0", ""} else digits


def _float(text: str) -> str:
    return _float_text(float(text))


def _float4(text: str) -> str:
    return _float_text(parse_float4(text))


def _float_text(number: float) -> str:
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return repr(number + 0.0)  # + 0.0 makes of -0.0, which equals 0, 0.0


def _moment(parser: Parser, text: str) -> str:
    value = parser(text)
    # What Python cannot hold, and infinity, in Postgres's words.
    if isinstance(value, str):
        return value
    return text if "infinity" in text else str(value.isoformat())


def _interval(text: str) -> str:
    months, days, microseconds = interval_parts(text)
    more, rest = divmod(microseconds, _MICROSECONDS_OF_DAY)
    return f"{months * 30 + days + more} days {rest} microseconds"


def _through(parser: Parser, form: Callable[[Value], str] = str) -> Callable[[str], str]:
    return lambda text: form(parser(text))


def _parser(type_name: str) -> Parser:
    parser = text_parser(type_name)
    if parser is None:  # pragma: no cover - called below with types that have one
        raise ValueError(type_name)
    return parser


_FORMS: Final[dict[str, Callable[[str], str]]] = {
    "numeric": _numeric,
    "float4": _float4,
    "float8": _float,
    "bool": _through(parse_bool, lambda value: "true" if value else "false"),
    "bytea": _through(parse_bytea, lambda value: "\\x" + value.hex()),
    "uuid": _through(_parser("uuid")),
    "citext": str.lower,
    "bpchar": lambda text: text.rstrip(" "),
    "interval": _interval,
    **{
        name: functools.partial(_moment, _parser(name))
        for name in ("date", "timestamp", "timestamptz", "time", "timetz")
    },
}
