"""Values as they stand in a frame: the text form of a column to the text of a JSON value.

Postgres is the authority: a value is what `to_jsonb(text::type)` gives, with the exceptions that
the real server's way through wal2json brings (NaN and infinities are null, bytea is bare hex).
For common types the same text is made here, which is quicker by far; anything unusual is left to
Postgres (a fast renderer returns None).
"""

import re
from collections.abc import Callable, Iterable

import asyncpg
import orjson

FastRenderer = Callable[[bytes], bytes | None]
NULL = b"null"
BYTEA_OID = 17
_NOT_A_NUMBER = frozenset((b"NaN", b"Infinity", b"-Infinity"))

_TIMESTAMP = re.compile(rb"\d{4,6}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d+)?")
_TIMESTAMPTZ = re.compile(rb"(\d{4,6}-\d\d-\d\d) (\d\d:\d\d:\d\d(?:\.\d+)?)\+00")
_DATE = re.compile(rb"\d{4,7}-\d\d-\d\d")
_PLAIN_FLOAT = re.compile(rb"-?\d+(?:\.\d+)?")


def _raw(value: bytes) -> bytes | None:
    return value


def _quoted(value: bytes) -> bytes | None:
    return b'"' + value + b'"'


def _text(value: bytes) -> bytes | None:
    return orjson.dumps(value.decode())


def _bool(value: bytes) -> bytes | None:
    return b"true" if value == b"t" else b"false"


def _numeric(value: bytes) -> bytes | None:
    return NULL if value in _NOT_A_NUMBER else value


def _float(value: bytes) -> bytes | None:
    if value in _NOT_A_NUMBER:
        return NULL
    # An exponent is written out in digits, and minus zero is zero: Postgres knows how.
    return value if value != b"-0" and _PLAIN_FLOAT.fullmatch(value) else None


def _timestamp(value: bytes) -> bytes | None:
    return b'"' + value.replace(b" ", b"T") + b'"' if _TIMESTAMP.fullmatch(value) else None


def _timestamptz(value: bytes) -> bytes | None:
    match = _TIMESTAMPTZ.fullmatch(value)
    return b'"%bT%b+00:00"' % match.groups() if match else None


def _date(value: bytes) -> bytes | None:
    return b'"' + value + b'"' if _DATE.fullmatch(value) else None


def _bytea(value: bytes) -> bytes | None:
    return b'"' + value.removeprefix(b"\\x") + b'"'


FAST: dict[int, FastRenderer] = {
    16: _bool,
    BYTEA_OID: _bytea,
    19: _text,  # name
    20: _raw,  # int8
    21: _raw,  # int2
    23: _raw,  # int4
    25: _text,
    26: _quoted,  # oid
    700: _float,  # float4
    701: _float,  # float8
    1043: _text,  # varchar
    1082: _date,
    1083: _quoted,  # time
    1114: _timestamp,
    1184: _timestamptz,
    1186: _quoted,  # interval
    1266: _quoted,  # timetz
    1700: _numeric,
    2950: _quoted,  # uuid
    3802: _raw,  # jsonb
}
"""Renderers by type oid. jsonb arrives in the very form in which it is to leave."""


def leave_to_postgres(_: bytes) -> bytes | None:
    """Render nothing: the fast renderer of the types that have none."""
    return None


class Values:
    """The values of one batch that Postgres has to render."""

    def __init__(self) -> None:
        self._wanted: dict[str, dict[bytes, bytes | None]] = {}

    def want(self, cast_name: str, value: bytes) -> None:
        """Note that `value` of the type called `cast_name` is to be rendered."""
        self._wanted.setdefault(cast_name, {})[value] = None

    def rendered(self, cast_name: str, value: bytes) -> bytes | None:
        """Return the JSON text of a value, or None if Postgres refused to render it."""
        return self._wanted[cast_name][value]

    async def render(self, connection: asyncpg.Connection) -> None:
        """Have Postgres render all values noted; one statement per type."""
        for cast_name, values in self._wanted.items():
            for value, text in zip(values, await _rendered(connection, cast_name, values), strict=True):
                values[value] = text


async def _rendered(
    connection: asyncpg.Connection, cast_name: str, values: Iterable[bytes]
) -> list[bytes | None]:
    texts = [value.decode() for value in values]
    statement = (
        f"select to_jsonb(v::{cast_name})::text from unnest($1::text[]) with ordinality u(v, n) order by n"
    )
    try:
        return [_encoded(row[0]) for row in await connection.fetch(statement, texts)]
    except asyncpg.PostgresError:
        if len(texts) == 1:
            return [None]
    # One value that cannot be rendered must not take the others with it.
    rendered = []
    for value in values:
        rendered += await _rendered(connection, cast_name, [value])
    return rendered


def _encoded(text: str | None) -> bytes:
    return NULL if text is None else text.encode()
