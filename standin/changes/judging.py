"""Who may see which change: filters and row-level security, judged by Postgres in batches.

Nothing is decided here that Postgres could decide: a filter is an expression over the text of a
column, and row security is a look at the row as it is now, in the role and with the claims of the
subscriber. What cannot be judged (an operator that the type has not, a policy that raises) hides the
change from the subscribers concerned and from nobody else.
"""

from collections import OrderedDict
from collections.abc import Sequence

import asyncpg
import structlog

from standin.changes import filters, sql
from standin.changes.catalog import Table
from standin.changes.filters import Condition

log = structlog.get_logger(__name__)

Text = bytes | None
"""Text form of a value; None is NULL."""

_Question = tuple[Condition, str, Text]
_REMEMBERED_VERDICTS = 50_000
# SQLSTATE class of errors that every value would meet: no such operator, no such privilege.
_HOPELESS_CLASS = "42"


class FilterJudge:
    """Judges conditions over column values, and remembers the verdicts.

    A verdict is as stable as the type's text form and operators, which the polling session pins.
    """

    def __init__(self) -> None:
        self._remembered: OrderedDict[_Question, bool] = OrderedDict()
        self._verdicts: dict[_Question, bool] = {}
        self._wanted: dict[tuple[Condition, str], dict[Text, None]] = {}

    def want(self, condition: Condition, cast_name: str, value: Text) -> None:
        """Note that the condition is to be judged for a value of the type called `cast_name`."""
        question = (condition, cast_name, value)
        verdict = self._remembered.get(question)
        if verdict is None:
            self._wanted.setdefault((condition, cast_name), {})[value] = None
        else:
            self._verdicts[question] = verdict

    def holds(self, condition: Condition, cast_name: str, value: Text) -> bool:
        """Return a verdict that was wanted before the last call of `judge`."""
        return self._verdicts[condition, cast_name, value]

    async def judge(self, connection: asyncpg.Connection) -> None:
        """Have Postgres judge everything wanted; one statement per condition."""
        wanted, self._wanted = self._wanted, {}
        for (condition, cast_name), values in wanted.items():
            verdicts = await _verdicts(connection, condition, cast_name, list(values))
            for value, verdict in zip(values, verdicts, strict=True):
                self._verdicts[condition, cast_name, value] = verdict
                self._remembered[condition, cast_name, value] = verdict
        while len(self._remembered) > _REMEMBERED_VERDICTS:
            self._remembered.popitem(last=False)

    def forget_batch(self) -> None:
        """Drop what was wanted; remembered verdicts stay."""
        self._verdicts = {}


async def _verdicts(
    connection: asyncpg.Connection, condition: Condition, cast_name: str, values: Sequence[Text]
) -> list[bool]:
    expression = filters.expression(condition, cast_name)
    statement = (
        f"select coalesce({expression}, false) from unnest($1::text[]) with ordinality u(v, n) order by n"
    )
    texts = [None if value is None else value.decode() for value in values]
    try:
        return [row[0] for row in await connection.fetch(statement, texts)]
    except asyncpg.PostgresError as error:
        if len(values) == 1:
            log.warning(
                "filter cannot be judged, change withheld", column=condition.column, reason=str(error)
            )
            return [False]
    verdicts = []
    for value in values:
        verdicts += await _verdicts(connection, condition, cast_name, [value])
    return verdicts


async def visible_rows(
    connection: asyncpg.Connection,
    table: Table,
    role: str,
    claims: str,
    keys: Sequence[tuple[Text, ...]],
) -> list[bool]:
    """Tell for each primary key whether `role` with `claims` sees that row now."""
    names = [column.name for column in table.key]
    arrays = [[None if key[i] is None else _decoded(key[i]) for key in keys] for i in range(len(names))]
    parameters = ", ".join(f"${i + 1}::text[]" for i in range(len(names)))
    match = " and ".join(
        f"t.{sql.identifier(name)} = u.k{i}::{table.key[i].cast_name}" for i, name in enumerate(names)
    )
    statement = (
        f"select exists (select from {sql.qualified(table.schema, table.name)} t where {match}) "
        f"from unnest({parameters}) with ordinality u({', '.join(f'k{i}' for i in range(len(names)))}, n) "
        "order by n"
    )
    try:
        async with connection.transaction():
            await connection.execute("select set_config('request.jwt.claims', $1, true)", claims)
            await connection.execute(f"set local role {sql.identifier(role)}")
            return [row[0] for row in await connection.fetch(statement, *arrays)]
    except asyncpg.PostgresError as error:
        if len(keys) == 1 or _hopeless(error):
            log.warning("row security cannot be judged, change withheld", table=table.name, role=role)
            return [False] * len(keys)
    seen = []
    for key in keys:
        seen += await visible_rows(connection, table, role, claims, [key])
    return seen


def _decoded(value: Text) -> str:
    assert value is not None  # noqa: S101 - told from None by the caller
    return value.decode()


def _hopeless(error: asyncpg.PostgresError) -> bool:
    return (error.sqlstate or "").startswith(_HOPELESS_CLASS)
