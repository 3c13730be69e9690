"""From bindings to a live subscription: which tables they mean, and whether they are allowed.

The checks are those that the real server makes when it inserts a subscription, with its texts. One
bad binding fails them all.
"""

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from standin.changes import filters, sql
from standin.changes.bindings import (
    ANY,
    BadSubscription,
    Binding,
    binding_id,
    inspect_list,
    refuse_wildcard_select,
)
from standin.changes.catalog import Catalog, Column, Table, published
from standin.changes.filters import Condition, parse_filter

# What the server calls text-compatible, by pg_type.typname.
TEXT_TYPES = frozenset(("text", "varchar", "bpchar", "name", "citext"))


@dataclass(frozen=True, slots=True)
class Interest:
    """One binding and the tables that it meant when it was checked."""

    binding: Binding
    id: int
    conditions: tuple[Condition, ...]
    tables: frozenset[int]


@dataclass(frozen=True, slots=True)
class Subscription:
    """All bindings of one subscriber; `claims` is the JSON text that policies read."""

    subscriber: Hashable
    bindings: tuple[Binding, ...]
    interests: tuple[Interest, ...]
    role: str
    claims: str


async def check(
    connection: asyncpg.Connection,
    publication: str,
    subscriber: Hashable,
    bindings: Sequence[Binding],
    claims: Mapping[str, Any],
) -> Subscription:
    """Return the subscription that `bindings` make under `claims`.

    Raises:
        BadSubscription: if any of the bindings is refused.
    """
    role = str(claims.get("role", ""))
    parsed = []
    for binding in bindings:
        refuse_wildcard_select(binding)
        if binding.filter is not None and binding.table is None:
            raise BadSubscription(
                "No subscription params provided. Please provide at least a `schema` or `table` to "
                f'subscribe to: %{{"event" => "{binding.event}", "filter" => "{binding.filter}", '
                f'"schema" => "{binding.schema}"}}'
            )
        parsed.append((binding, parse_filter(binding.filter)))
    interests = []
    for binding, conditions in parsed:
        tables = await _tables(connection, publication, binding, conditions, role)
        interests.append(Interest(binding, binding_id(binding), conditions, tables))
    text = json.dumps(dict(claims), separators=(",", ":"), ensure_ascii=False)
    return Subscription(subscriber, tuple(bindings), tuple(interests), role, text)


async def _tables(
    connection: asyncpg.Connection,
    publication: str,
    binding: Binding,
    conditions: Sequence[Condition],
    role: str,
) -> frozenset[int]:
    patterns = [None if name in (None, ANY) else name for name in (binding.schema, binding.table)]
    tables = await published(connection, publication, *patterns)
    if not tables:
        raise BadSubscription(
            "Unable to subscribe to changes with given parameters. "
            "Please check Realtime is enabled for the given connect parameters: "
            + _described(binding, conditions)
        )
    try:
        await _check_privileges(connection, tables, binding, conditions, role)
    except _Refused as refusal:
        raise _exception(binding, conditions, f"ERROR P0001 (raise_exception) {refusal}") from None
    except asyncpg.PostgresError as error:
        raise _exception(binding, conditions, describe_error(error)) from None
    return tables


class _Refused(Exception):  # noqa: N818 - what the checks of the server raise; it never leaves this module
    pass


async def _check_privileges(
    connection: asyncpg.Connection,
    oids: frozenset[int],
    binding: Binding,
    conditions: Sequence[Condition],
    role: str,
) -> None:
    # Postgres itself says that a role does not exist.
    await connection.fetchval("select has_table_privilege($1::text, 'pg_class', 'SELECT')", role)
    if not conditions and binding.select is None:
        return
    for table in (await Catalog().read(connection, oids, [role])).values():
        readable = table.readable(role)
        for condition in conditions:
            await _check_condition(connection, table, condition, readable)
        for name in binding.select or ():
            if name not in readable:
                raise _Refused(f"invalid column for select {name}")


async def _check_condition(
    connection: asyncpg.Connection, table: Table, condition: Condition, readable: frozenset[str]
) -> None:
    column = table.column(condition.column)
    if column is None or column.name not in readable:
        raise _Refused(f"invalid column for filter {condition.column}")
    operator, value = condition.operator, condition.value
    if operator == "is":
        _check_is(column, value)
    elif operator in filters.TEXT_OPERATORS:
        await _check_pattern(connection, column, operator, value)
    elif operator == "in":
        statement = f"select coalesce(cardinality({sql.literal(value)}::{column.cast_name}[]), 0)"
        if await connection.fetchval(statement) > filters.MAX_IN_VALUES:
            raise _Refused(f"too many values for `in` filter. Maximum {filters.MAX_IN_VALUES}")
    else:
        await connection.fetchval(f"select {sql.literal(value)}::{column.cast_name} is null")


def _check_is(column: Column, value: str) -> None:
    word = value.lower()
    if word not in filters.IS_VALUES:
        raise _Refused(f"invalid value for is filter {value}")
    if word != "null" and column.type_name != "bool":
        raise _Refused(f"is {word} filter requires a boolean column, got {column.cast_name}")


async def _check_pattern(connection: asyncpg.Connection, column: Column, operator: str, value: str) -> None:
    if column.type_name not in TEXT_TYPES:
        raise _Refused(f"operator {operator} requires a text-compatible column type, got {column.cast_name}")
    if operator in ("match", "imatch"):
        try:
            await connection.fetchval("select '' ~ $1::text", value)
        except asyncpg.InvalidRegularExpressionError as error:
            raise _Refused(f"invalid regular expression for {operator} filter: {error}") from None


def _exception(binding: Binding, conditions: Sequence[Condition], error: str) -> BadSubscription:
    return BadSubscription(
        "Unable to subscribe to changes with given parameters. "
        "An exception happened so please check your connect parameters: "
        f"{_described(binding, conditions)}. Exception: {error}"
    )


def _described(binding: Binding, conditions: Sequence[Condition]) -> str:
    select = "nil" if binding.select is None else inspect_list(list(binding.select))
    return (
        f"[event: {binding.event}, schema: {binding.schema}, table: {binding.table or ANY}, "
        f"filters: {inspect_list([condition.described() for condition in conditions])}, select: {select}]"
    )


def describe_error(error: asyncpg.PostgresError) -> str:
    """Return a database error as the real server words it: `ERROR 22P02 (invalid_text_representation) …`."""
    words = re.findall(r"[A-Z][a-z0-9]*", type(error).__name__.removesuffix("Error"))
    return f"ERROR {error.sqlstate} ({'_'.join(words).lower()}) {error.message}"
