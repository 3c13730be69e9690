"""Filters of a binding: PostgREST-like text to conditions, and conditions to SQL.

Pure. Values are judged by Postgres itself (see `standin.changes.matching`): a condition only says
which expression is to be evaluated over the text of a column.
"""

import re
from dataclasses import dataclass
from functools import lru_cache

from standin.changes import sql
from standin.changes.bindings import BadSubscription, inspect

OPERATORS = {
    "eq": "=",
    "neq": "<>",
    "lt": "<",
    "lte": "<=",
    "gt": ">",
    "gte": ">=",
    "in": "= any",
    "like": "~~",
    "ilike": "~~*",
    "is": "is",
    "match": "~",
    "imatch": "~*",
    "isdistinct": "is distinct from",
}
TEXT_OPERATORS = ("like", "ilike", "match", "imatch")
IS_VALUES = ("null", "true", "false", "unknown")
MAX_IN_VALUES = 100
_NEGATION = "not."


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of a filter; the conditions of a filter are joined by AND.

    Attributes:
        column: name of the column.
        operator: a key of `OPERATORS`.
        value: text of the value; for `in` the text of a Postgres array.
        negated: True if it was written with `not.`.
    """

    column: str
    operator: str
    value: str
    negated: bool

    def described(self) -> tuple[str, str, str, bool]:
        """Return the condition as it appears in the messages of the server."""
        return (self.column, self.operator, self.value, self.negated)


def parse_filter(text: str | None) -> tuple[Condition, ...]:
    """Return the conditions of a filter; none for a blank one.

    Raises:
        BadSubscription: if the text is no filter.
    """
    if text is None or not text.strip():
        return ()
    return tuple(_condition(segment) for segment in _segments(text))


def _segments(text: str) -> list[str]:
    """Split at the commas outside of quotes and parentheses."""
    segments: list[str] = []
    current: list[str] = []
    depth, quoted, escaped = 0, False, False
    for char in text:
        if escaped:
            escaped = False
        elif quoted:
            escaped = char == "\\"
            quoted = char != '"'
        elif char == '"':
            quoted = True
        elif char == "(":
            depth += 1
        elif char == ")":
            depth = max(0, depth - 1)
        elif char == "," and not depth:
            segments.append("".join(current))
            current = []
            continue
        current.append(char)
    segments.append("".join(current))
    stripped = [segment.strip() for segment in segments]
    if not all(stripped):
        raise _unparsable("filter must not contain empty segments (check for extra commas)")
    return stripped


def _condition(segment: str) -> Condition:
    column, equals, rest = segment.partition("=")
    if not equals:
        raise _unparsable(inspect([segment]))
    negated = rest.startswith(_NEGATION)
    body = rest.removeprefix(_NEGATION) if negated else rest
    operator, dot, value = body.partition(".")
    if not dot or operator not in OPERATORS:
        raise _unparsable(inspect(body.split(".", 1)))
    if operator == "in":
        if not (value.startswith("(") and value.endswith(")")):
            raise _unparsable("`in` filter value must be wrapped by parentheses")
        value = sql.array_literal(_in_values(value[1:-1]))
    else:
        value = _unquoted(value)
    return Condition(column, operator, value, negated)


_IN_VALUE = re.compile(r'\s*("(?:[^"\\]|\\.)*"|[^,]*?)\s*(,|$)', re.DOTALL)


def _in_values(text: str) -> list[str]:
    values, position = [], 0
    while True:
        match = _IN_VALUE.match(text, position)
        if match is None:
            raise _unparsable(inspect(["in", text]))
        values.append(_unquoted(match[1]))
        position = match.end()
        if not match[2]:
            return values


def _unquoted(value: str) -> str:
    if len(value) > 1 and value.startswith('"') and value.endswith('"'):
        return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
    return value


def _unparsable(what: str) -> BadSubscription:
    return BadSubscription(f"Error parsing `filter` params: {what}")


@lru_cache(maxsize=4096)
def expression(condition: Condition, type_name: str) -> str:
    """Return the SQL expression that judges the text `v` of a column of type `type_name`.

    `type_name` is the name as Postgres prints it without a modifier, so that `character` cuts to
    one character, as the real server's cast does.
    """
    value = sql.literal(condition.value)
    column = f"v::{type_name}"
    if condition.operator == "is":
        if condition.value.lower() not in IS_VALUES:
            raise BadSubscription(f"unknown value for is filter: {condition.value}")
        result = f"{column} is {condition.value.lower()}"
    elif condition.operator == "in":
        result = f"{column} = any({value}::{type_name}[])"
    else:
        result = f"{column} {OPERATORS[condition.operator]} {value}::{type_name}"
    return f"not ({result})" if condition.negated else result
