"""Quoting of identifiers and literals for statements that cannot take them as parameters."""

from collections.abc import Iterable


def identifier(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def qualified(schema: str, name: str) -> str:
    """Return `schema`.`name`, both quoted."""
    return f"{identifier(schema)}.{identifier(name)}"


def literal(text: str) -> str:
    """Return `text` as a SQL string constant, whatever `standard_conforming_strings` says."""
    if "\\" in text:
        return " E'" + text.replace("\\", "\\\\").replace("'", "''") + "'"
    return "'" + text.replace("'", "''") + "'"


def array_literal(values: Iterable[str]) -> str:
    """Return Postgres's text form of an array of `values`, quoting only where it must."""
    return "{" + ",".join(_array_element(value) for value in values) + "}"


def _array_element(value: str) -> str:
    plain = value and value.upper() != "NULL" and not any(c in '{},"\\' or c.isspace() for c in value)
    if plain:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
