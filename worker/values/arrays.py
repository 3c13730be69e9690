"""Postgres array literals, `{1,NULL,"a, b"}`, to nested lists of texts, and back.

It knows the syntax only; what the elements mean is for the caller.
"""

from collections.abc import Callable, Iterator

from worker.values.scalars import Value

_NEEDS_QUOTES = frozenset('{}",\\ \t\n\r\v\f')


def parse_array(text: str, element: Callable[[str], Value]) -> list[Value]:
    """Read an array literal into nested lists; `element` makes the value of each element's text.

    Lower bounds (`[0:1]={1,2}`) are dropped, as asyncpg drops them.

    Raises:
        ValueError: no array literal.
    """
    start = text.find("{")
    if start < 0 or (start > 0 and text[start - 1] != "="):
        raise ValueError("no array literal")
    outer: list[list[Value]] = [[]]
    tokens = _tokens(text[start:])
    for kind, value in tokens:
        if kind == "{":
            outer.append([])
        elif kind == "}":
            done = outer.pop()
            if not outer:
                raise ValueError("no array literal")
            outer[-1].append(done)
        else:
            outer[-1].append(None if kind == "null" else element(value))
    if len(outer) != 1 or len(outer[0]) != 1 or not isinstance(outer[0][0], list):
        raise ValueError("no array literal")
    result: list[Value] = outer[0][0]
    return result


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Yield ("{" | "}" | "null" | "value", text) of an array literal."""
    at, end = 0, len(text)
    while at < end:
        letter = text[at]
        if letter in "{}":
            yield letter, letter
            at += 1
        elif letter == ",":
            at += 1
        elif letter == '"':
            value, at = _quoted(text, at + 1)
            yield "value", value
        else:
            value, at = _bare(text, at)
            yield ("null", "") if value.upper() == "NULL" else ("value", value)


def _quoted(text: str, at: int) -> tuple[str, int]:
    letters: list[str] = []
    while text[at : at + 1] != '"':
        if at >= len(text):
            raise ValueError("unclosed quote in an array literal")
        at += text[at] == "\\"
        letters.append(text[at : at + 1])
        at += 1
    return "".join(letters), at + 1


def _bare(text: str, at: int) -> tuple[str, int]:
    letters: list[str] = []
    while at < len(text) and text[at] not in ",{}":
        at += text[at] == "\\"
        letters.append(text[at : at + 1])
        at += 1
    return "".join(letters), at


def format_array(values: list[Value]) -> str:
    """Write nested lists of texts (None is NULL) as an array literal, quoting only where it must."""
    return "{" + ",".join(_format_element(value) for value in values) + "}"


def _format_element(value: Value) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, list):
        return format_array(value)
    text = str(value)
    if text and text.upper() != "NULL" and _NEEDS_QUOTES.isdisjoint(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
