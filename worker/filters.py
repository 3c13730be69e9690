"""Filters in PostgREST's form, as Realtime takes them, judged by Postgres's rules as nearly as Python can.

    status=eq.paid              amount=gt.100,status=in.(paid,"on hold")         note=not.is.null

Conditions joined by commas must all hold. Operators: eq neq lt lte gt gte in like ilike is match imatch
isdistinct, each also with `not.` before it. A value with a comma is put in double quotes, with backslash
escapes. NULL matches nothing but `is.null` and `isdistinct`; `not.` of what is unknown stays unknown.

Where this differs from Postgres:

* Text is ordered by code point, as collation "C" does, whatever the column's collation.
* `match` and `imatch` use Python's regular expressions, unanchored, with `.` matching newlines as in
  Postgres. POSIX classes (`[[:alpha:]]`) and Postgres's own escapes are refused, or mean something else.
* `ilike` and `imatch` fold case by Unicode, whatever the locale.
* Ordering (lt, lte, gt, gte) of enums, arrays, json and network addresses is refused, and so are all
  comparisons of types that only Postgres reads (ranges, geometry, composites): test those in the handler.
* Moments are constants: not `now` or `yesterday`; without a zone they are UTC. Years that Python does not
  know sort before or after all others, by their text among each other.
"""

import datetime as dt
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final
from uuid import UUID

from worker.catalogue import ColumnInfo, Table
from worker.errors import FilterError
from worker.values.decoding import UNREADABLE, text_parser
from worker.values.scalars import FLOATS, INTEGERS, TEMPORALS, TEXTS, Parser, Value

_ORDER: Final = frozenset({"lt", "lte", "gt", "gte"})
_PATTERNS: Final = frozenset({"like", "ilike", "match", "imatch"})
_OPERATORS: Final = (
    *("eq", "neq", "lt", "lte", "gt", "gte", "in", "like", "ilike", "is", "match", "imatch", "isdistinct"),
)
_IS: Final[dict[str, bool | None]] = {"null": None, "unknown": None, "true": True, "false": False}

_ORDERED_TYPES: Final = (
    INTEGERS | FLOATS | TEXTS | TEMPORALS | {"numeric", "bool", "uuid", "bytea", "interval"}
) - {"xml", "money", "tsvector", "tsquery", "jsonpath"}
_PATTERN_TYPES: Final = frozenset({"text", "varchar", "bpchar", "citext", "name"})

_START: Final = re.compile(
    r'\s*(?P<column>"(?:[^"]|"")+"|[^=,]+?)\s*=(?P<negated>not\.)?(?P<operator>[a-z]+)\.'
)
_QUOTED: Final = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_ITEM: Final = re.compile(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^,()"]*?))\s*([,)])', re.DOTALL)
# Years before Christ or of five digits, and the end of the day: no Python value, but constants all the same.
_FAR_MOMENT: Final = re.compile(r"\d{5}|.*BC$|24:00")
_ESCAPE: Final = re.compile(r"\\(.)", re.DOTALL)

# What a condition says of a value: SQL's three truth values, None being unknown.
_Judge = Callable[[Value], bool | None]


@dataclass(frozen=True)
class Condition:
    """One condition: column, operator, and its operand as text (of `in`, a tuple of texts, None for NULL)."""

    column: str
    operator: str
    negated: bool
    operand: str | tuple[str | None, ...]

    def __str__(self) -> str:
        operand = self.operand if isinstance(self.operand, str) else f"({','.join(map(str, self.operand))})"
        return f"{self.column}={'not.' if self.negated else ''}{self.operator}.{operand}"


@dataclass(frozen=True)
class Filter:
    """Conditions that must all hold.

    Attributes:
        text: as it was written.
        conditions: in the order written.
    """

    text: str
    conditions: tuple[Condition, ...]
    _judges: tuple[_Judge, ...] = field(default=(), repr=False, compare=False)

    @classmethod
    def parse(cls, text: str) -> "Filter":
        """Read a filter.

        Raises:
            FilterError: it cannot be read; the message says which part and what would do.
        """
        if not text.strip():
            raise FilterError("an empty filter matches everything: leave it out")
        return cls(text, tuple(_conditions(text)))

    @property
    def columns(self) -> frozenset[str]:
        """The columns it looks at."""
        return frozenset(condition.column for condition in self.conditions)

    def validate(self, table: Table) -> None:
        """Check that it fits a table: its columns, and operators and operands for their types.

        Raises:
            FilterError: it does not; one line about the first condition that does not fit.
        """
        self.bind(table)

    def bind(self, table: Table) -> "Filter":
        """Give the same filter, with operands read as the types of the table's columns.

        Raises:
            FilterError: see `validate`.
        """
        judges: list[_Judge] = []
        for condition in self.conditions:
            column = table.columns.get(condition.column)
            if column is None:
                raise FilterError(f'{table.schema}.{table.name} has no column "{condition.column}"')
            complaint = _unfit(condition, column)
            if complaint:
                raise FilterError(f"{complaint}")
            try:
                judges.append(_judge(condition, column.value_type))
            except (*UNREADABLE, re.error):
                raise FilterError(f'the operand of "{condition.column}" is no {column.sql_type}') from None
        return Filter(self.text, self.conditions, tuple(judges))

    def matches(self, values: Mapping[str, Value]) -> bool:
        """Tell whether a row matches.

        Args:
            values: typed values by column; all of `columns` must be there. A filter that was not bound takes
                its operands for the type that each value has.

        Raises:
            KeyError: a column is not there (MissingValueError from a Record).
        """
        for place, condition in enumerate(self.conditions):
            value = values[condition.column]
            verdict = self._judges[place](value) if self._judges else _unbound(condition, value)
            if verdict is None or verdict is condition.negated:
                return False
        return True


def _conditions(text: str) -> list[Condition]:
    conditions: list[Condition] = []
    at = 0
    while True:
        start = _START.match(text, at)
        if start is None:
            raise FilterError(_unreadable(text, at))
        operator = start["operator"]
        if operator not in _OPERATORS:
            raise FilterError(f'no operator "{operator}"; there are {" ".join(_OPERATORS)}')
        operand, at = _operand(text, start.end(), operator)
        column = start["column"]
        if column.startswith('"'):
            column = column[1:-1].replace('""', '"')
        conditions.append(Condition(column, operator, start["negated"] is not None, operand))
        if at >= len(text):
            return conditions
        if text[at] != ",":
            raise FilterError(f'expected a comma or the end after "{text[:at]}"')
        at += 1


def _unreadable(text: str, at: int) -> str:
    part = text[at:]
    if not part.strip():
        return "a condition is missing beside a comma"
    advice = "a condition is column=operator.value"
    if at:
        advice += '; a value with a comma is quoted: name=eq."a,b"'
    return f'cannot read "{part}": {advice}'


def _operand(text: str, at: int, operator: str) -> tuple[str | tuple[str | None, ...], int]:
    if operator == "in":
        return _list(text, at)
    quoted = _QUOTED.match(text, at)
    if quoted is not None:
        operand, end = _ESCAPE.sub(r"\1", quoted[1]), quoted.end()
    else:
        comma = text.find(",", at)
        end = len(text) if comma < 0 else comma
        operand = text[at:end]
    if operator == "is" and operand.lower() not in _IS:
        raise FilterError(f'"is" takes null, true, false or unknown, not "{operand}"')
    return operand, end


def _list(text: str, at: int) -> tuple[tuple[str | None, ...], int]:
    if text[at : at + 1] != "(":
        raise FilterError('"in" takes a list in parentheses: in.(a,b)')
    items: list[str | None] = []
    at += 1
    while True:
        item = _ITEM.match(text, at)
        if item is None:
            raise FilterError('the list of "in" does not end with a parenthesis')
        bare = item[2]
        if bare is None:
            items.append(_ESCAPE.sub(r"\1", item[1]))
        else:
            items.append(None if bare.upper() == "NULL" else bare)
        at = item.end()
        if item[3] == ")":
            return tuple(items), at


def _unfit(condition: Condition, column: ColumnInfo) -> str | None:
    """Say why an operator does not fit a column's type, or give None."""
    kind, operator = column.value_type, condition.operator
    if operator == "is":
        wants_boolean = str(condition.operand).lower() != "null"
        return _say(condition, column, "needs a boolean column") if wants_boolean and kind != "bool" else None
    if operator in _PATTERNS:
        return None if kind in _PATTERN_TYPES else _say(condition, column, "needs a text column")
    if kind == "json":
        return _say(condition, column, "cannot be: json has no equality; jsonb has")
    if text_parser(kind) is None:
        return _say(condition, column, "cannot be judged outside Postgres; test it in the handler")
    is_enum = kind == "text" and column.type != "text"
    if operator in _ORDER and (kind not in _ORDERED_TYPES or is_enum):
        return _say(condition, column, "has no order here; use eq, neq or in")
    return None


def _say(condition: Condition, column: ColumnInfo, what: str) -> str:
    return f'"{condition.operator}" of "{column.name}" ({column.sql_type}) {what}'


def _judge(condition: Condition, kind: str) -> _Judge:
    operator, operand = condition.operator, condition.operand
    if operator == "is":
        wanted = _IS[str(operand).lower()]
        return lambda value: value is wanted
    if operator in _PATTERNS:
        return functools.partial(_search, _pattern(operator, str(operand)))
    parser = functools.partial(_read_operand, kind, text_parser(kind) or str)
    fold = _FOLDS.get(kind, _key)
    if not isinstance(operand, str):
        items = [None if item is None else fold(parser(item)) for item in operand]
        return functools.partial(_within, items, fold)
    return functools.partial(_compare, operator, fold(parser(operand)), fold)


def _read_operand(kind: str, parser: Parser, text: str) -> Value:
    value = parser(text)
    if kind in TEMPORALS | {"interval"} and isinstance(value, str) and not _FAR_MOMENT.match(value):
        # The parsers of moments give back what they cannot read; words such as "yesterday" are no constants.
        raise ValueError(kind)
    return value


@functools.lru_cache(maxsize=1024)
def _judge_of(condition: Condition, kind: str) -> _Judge:
    return _judge(condition, kind)


def _unbound(condition: Condition, value: Value) -> bool | None:
    kind = next((_KINDS[base] for base in type(value).__mro__ if base in _KINDS), "text")
    try:
        return _judge_of(condition, kind)(value)
    except (*UNREADABLE, re.error):
        # An operand that is none of this type cannot be equal to a value of it.
        return None


def _compare(operator: str, operand: Value, fold: Callable[[Value], Value], value: Value) -> bool | None:
    if value is None:
        return True if operator == "isdistinct" else None
    held = fold(value)
    try:
        return _COMPARISONS[operator](held, operand)
    except TypeError:
        # Values that do not compare: the table was altered, or arrays with NULL inside.
        return None


def _within(items: list[Value], fold: Callable[[Value], Value], value: Value) -> bool | None:
    if value is None:
        return None
    held = fold(value)
    if any(item is not None and item == held for item in items):
        return True
    return None if None in items else False


def _search(pattern: re.Pattern[str], value: Value) -> bool | None:
    return None if value is None else pattern.search(str(value)) is not None


def _pattern(operator: str, operand: str) -> re.Pattern[str]:
    folded = re.IGNORECASE if operator.startswith("i") else re.NOFLAG
    if operator.endswith("match"):
        return re.compile(operand, re.DOTALL | folded)
    return re.compile(rf"\A{_like(operand)}\Z", re.DOTALL | folded)


def _like(operand: str) -> str:
    letters: list[str] = []
    escaped = False
    for letter in operand:
        if escaped or letter not in "\\%_":
            letters.append(re.escape(letter))
            escaped = False
        elif letter == "\\":
            escaped = True
        else:
            letters.append(".*" if letter == "%" else ".")
    if escaped:
        raise ValueError("a LIKE pattern must not end with its escape character")
    return "".join(letters)


def _key(value: Value) -> Value:
    """Give what a value is compared by: NaN equals itself and is above all numbers, as in Postgres."""
    if isinstance(value, (int, float, Decimal)):
        return (1, 0) if value != value else (0, value)  # noqa: PLR0124 - NaN
    return value


def _moment_key(value: Value) -> tuple[int, Value]:
    """Order moments: years that Python does not know, which are text, stand before or after all others."""
    if isinstance(value, str):
        return (-1 if value.endswith("BC") else 1, value)
    if isinstance(value, dt.datetime):
        # Infinity is naive even in timestamptz; only its place in the order matters.
        value = value.replace(tzinfo=None)
    return (0, value)


def _json_key(value: Value) -> Value:
    """Tell true from 1, which Python takes for equal."""
    if isinstance(value, dict):
        return {name: _json_key(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_json_key(member) for member in value]
    return (value,) if isinstance(value, bool) else value


_COMPARISONS: Final[dict[str, Callable[[Value, Value], bool]]] = {
    "eq": lambda held, operand: held == operand,
    "neq": lambda held, operand: held != operand,
    "isdistinct": lambda held, operand: held != operand,
    "lt": lambda held, operand: held < operand,
    "lte": lambda held, operand: held <= operand,
    "gt": lambda held, operand: held > operand,
    "gte": lambda held, operand: held >= operand,
}
# For a filter that was not bound: the type whose operands fit a value.
_KINDS: Final[dict[type, str]] = {
    bool: "bool",
    int: "numeric",
    float: "float8",
    Decimal: "numeric",
    bytes: "bytea",
    UUID: "uuid",
    dt.datetime: "timestamptz",
    dt.date: "date",
    dt.time: "time",
    dt.timedelta: "interval",
    dict: "jsonb",
}
_FOLDS: Final[dict[str, Callable[[Value], Value]]] = {
    "citext": lambda value: str(value).lower(),
    "bpchar": lambda value: str(value).rstrip(" "),
    "jsonb": _json_key,
    "date": _moment_key,
    "timestamp": _moment_key,
    "timestamptz": _moment_key,
}
