"""The text of one value, as Postgres writes it, to the Python value that asyncpg would have given.

It knows the scalar types whose text Python can read exactly. It knows no wire format (see decoding), and no
type whose meaning lies in the catalogue: ranges, geometry, composites and the like are Postgres's to read
(see database). What Python cannot hold (year 10000, 24:00, years before Christ) stays Postgres's text.
"""

import datetime as dt
import ipaddress
import json
import re
import struct
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final, TypeAlias
from uuid import UUID

from asyncpg import BitString

# The Python value of a column, of whichever type the column has.
Value: TypeAlias = Any
Parser = Callable[[str], Value]

INTEGERS: Final = frozenset({"int2", "int4", "int8", "oid", "xid", "cid"})
FLOATS: Final = frozenset({"float4", "float8"})
# asyncpg gives plain str for these, in the text that Postgres prints.
TEXTS: Final = frozenset(
    {
        *("text", "varchar", "bpchar", "name", "citext", "xml", "money", "tsvector", "tsquery", "jsonpath"),
        *("macaddr", "macaddr8", "vector", "halfvec", "sparsevec", "ltree", "lquery", "ltxtquery"),
        *("regclass", "regtype", "regproc", "regprocedure", "regoper", "regoperator", "regrole"),
        *("regnamespace", "regconfig", "regdictionary", "regcollation"),
    }
)
JSONS: Final = frozenset({"json", "jsonb"})
TEMPORALS: Final = frozenset({"date", "timestamp", "timestamptz", "time", "timetz"})

_INTERVAL: Final = re.compile(
    r"(?:(?P<years>[+-]?\d+) years? ?)?(?:(?P<mons>[+-]?\d+) mons? ?)?(?:(?P<days>[+-]?\d+) days? ?)?"
    r"(?:(?P<sign>[+-]?)(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)(?:\.(?P<fraction>\d{1,6}))?)?"
)


def parse_json(text: str) -> Value:
    """Parse as json.loads does, but also integers of more digits than int() reads from text (4300)."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # jsonb holds numbers up to 131072 digits; one such row must not stop its lane.
        return json.loads(text, parse_int=lambda digits: int(Decimal(digits)))


def parse_float4(text: str) -> float:
    """Round to single precision: the shortest text of a real (0.1) is not the double that it stands for."""
    value: float = struct.unpack("f", struct.pack("f", float(text)))[0]
    return value


def parse_bool(text: str) -> bool:
    """Read both spellings of Postgres's output: t and true."""
    if text in {"t", "true"}:
        return True
    if text in {"f", "false"}:
        return False
    raise ValueError("no boolean")


def parse_bytea(text: str) -> bytes:
    r"""Read hexadecimal bytes; Realtime leaves the \x out."""
    return bytes.fromhex(text.removeprefix("\\x"))


def parse_date(text: str) -> dt.date | str:
    """Read a date; infinity is date.max and date.min, as with asyncpg."""
    if text in {"infinity", "-infinity"}:
        return dt.date.max if text == "infinity" else dt.date.min
    try:
        return dt.date.fromisoformat(text)
    except ValueError:
        return text


def _parse_moment(text: str, *, zoned: bool) -> dt.datetime | str:
    if text in {"infinity", "-infinity"}:
        # Naive even for timestamptz: these are the values that asyncpg writes back as infinity.
        return dt.datetime.max if text == "infinity" else dt.datetime.min  # noqa: DTZ901 - see above
    try:
        moment = dt.datetime.fromisoformat(text)
        return moment.astimezone(dt.UTC) if zoned and moment.tzinfo else moment
    except (ValueError, OverflowError):
        # Postgres's own text, not JSON's: a blank for the T, and a short zone.
        return re.sub(r"([+-]\d\d):00(?= BC$|$)", r"\1", re.sub(r"(?<=\d)T(?=\d)", " ", text))


def parse_timestamp(text: str) -> dt.datetime | str:
    """Read a timestamp without time zone; infinity is datetime.max and datetime.min."""
    return _parse_moment(text, zoned=False)


def parse_timestamptz(text: str) -> dt.datetime | str:
    """Read a timestamp with time zone, in UTC; infinity is the naive datetime.max and datetime.min."""
    return _parse_moment(text, zoned=True)


def parse_time(text: str) -> dt.time | str:
    """Read a time of day, with its zone where it has one; 24:00:00 stays text."""
    # Python 3.13 and later read 24:00 as midnight, which Postgres tells apart.
    if text.startswith("24"):
        return text
    try:
        return dt.time.fromisoformat(text)
    except ValueError:
        return text


def interval_parts(text: str) -> tuple[int, int, int]:
    """Split an interval in Postgres's own style into (months, days, microseconds).

    Raises:
        ValueError: another IntervalStyle, or infinity.
    """
    found = _INTERVAL.fullmatch(text)
    if found is None or not text:
        raise ValueError("no interval in Postgres's style")
    years, mons, days = (int(found[name] or 0) for name in ("years", "mons", "days"))
    seconds = (int(found["hours"] or 0) * 60 + int(found["minutes"] or 0)) * 60 + int(found["seconds"] or 0)
    microseconds = seconds * 1_000_000 + int((found["fraction"] or "").ljust(6, "0"))
    return years * 12 + mons, days, -microseconds if found["sign"] == "-" else microseconds


def parse_interval(text: str) -> dt.timedelta | str:
    """Read an interval as asyncpg does: a year is 365 days, a month 30."""
    try:
        months, days, microseconds = interval_parts(text)
        years, months = (-(-months // 12), -(-months % 12)) if months < 0 else divmod(months, 12)
        return dt.timedelta(days=days + months * 30 + years * 365, microseconds=microseconds)
    except (ValueError, OverflowError):
        return text


def parse_inet(text: str) -> Value:
    """Read an address, or an interface where it has a netmask."""
    interface = ipaddress.ip_interface(text)
    # 10.0.0.1/32 is how a cast to text writes the address alone.
    return interface.ip if interface.network.prefixlen == interface.max_prefixlen else interface


_SPECIAL: Final[dict[str, Parser]] = {
    "float4": parse_float4,
    "float8": float,
    "numeric": Decimal,
    "bool": parse_bool,
    "bytea": parse_bytea,
    "uuid": UUID,
    "date": parse_date,
    "timestamp": parse_timestamp,
    "timestamptz": parse_timestamptz,
    "time": parse_time,
    "timetz": parse_time,
    "interval": parse_interval,
    "inet": parse_inet,
    "cidr": ipaddress.ip_network,
    "bit": BitString,
    "varbit": BitString,
}

PARSERS: Final[dict[str, Parser]] = {
    **dict.fromkeys(INTEGERS, int),
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(JSONS, parse_json),
    **_SPECIAL,
}
"""Parser of each type that Python reads by itself, by pg_type.typname. A parser raises ValueError (Decimal:
ArithmeticError) on text that the type does not write."""
