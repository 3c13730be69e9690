"""Values that only Postgres can read (ranges, geometry, composites): one statement for a batch.

The statement takes the values as they came and gives them back typed, through asyncpg. It reads no table.
Where a value no longer fits its type (the type was altered since the change), that value alone comes as text.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from worker.values.decoding import UNREADABLE, Form, written_value
from worker.values.scalars import Value

# Classes of SQLSTATE that say "these data or names", not "this connection": 22 data exception, 23 constraint
# (of a domain), 42 undefined column, table or type. 42501 (insufficient privilege) is for the operator to
# mend.
_DATA_CLASSES: Final = frozenset({"22", "23", "42"})
_NO_PRIVILEGE: Final = "42501"


def is_data_error(error: Exception) -> bool:
    """Tell whether an error comes from the data or a changed table, so that the rest of a batch can go on."""
    if not isinstance(error, DBAPIError):
        # asyncpg refuses what Python cannot hold (year 10000) with plain errors while it reads the row.
        return isinstance(error, UNREADABLE)
    state = str(getattr(error.orig, "sqlstate", None) or "")
    return state[:2] in _DATA_CLASSES and state != _NO_PRIVILEGE


async def decode_by_database(
    session: AsyncSession | AsyncConnection,
    rows: Sequence[Mapping[str, bytes]],
    casts: Mapping[str, str],
    form: Form = "json",
) -> list[dict[str, Value]]:
    """Have Postgres read values.

    Args:
        session: in a transaction; a savepoint is set, so that a value which does not fit does not end it.
        rows: per row the values by column, as they came; a row may lack columns.
        casts: per column the name of its type, quoted for a statement.
        form: of the values; "text" values are JSON strings of Postgres's text output here.

    Returns:
        Per row the same columns with the values that asyncpg gives.
    """
    columns = list(casts)
    if not columns or not rows:
        return [{} for _ in rows]
    statement = _statement([casts[column] for column in columns], form)
    try:
        found = await _read(session, statement, _document(rows, columns))
        return [
            {column: found[at][place + 1] for place, column in enumerate(columns) if column in row}
            for at, row in enumerate(rows)
        ]
    except Exception as error:
        if not is_data_error(error):
            raise
    return [
        {column: await _one(session, row[column], casts[column], form) for column in columns if column in row}
        for row in rows
    ]


async def _one(session: AsyncSession | AsyncConnection, raw: bytes, cast: str, form: Form) -> Value:
    """Read one value of a batch that failed: typed, else as Postgres's text, else as it was written."""
    for as_text in (False, True):
        statement = _statement([cast], form, as_text=as_text)
        try:
            return (await _read(session, statement, _document([{"c0": raw}], ["c0"])))[0][1]
        except Exception as error:
            if not is_data_error(error):
                raise
    return written_value(raw)


async def _read(session: AsyncSession | AsyncConnection, statement: str, document: str) -> Sequence[Value]:
    async with session.begin_nested():
        result = await session.execute(text(statement), {"document": document})
        return sorted(result.all(), key=lambda row: row[0])


def plain(name: str) -> str:
    """Make a quoted name safe for text(), which takes a colon for a parameter."""
    return name.replace(":", "\\:")


def printed(value: str) -> str:
    """Give the expression for a value's text as Postgres prints it; a cast differs for char(n) and inet."""
    # num_nonnulls, because IS NULL is true of a composite whose fields are all NULL.
    return f"case pg_catalog.num_nonnulls({value}) when 1 then pg_catalog.format('%s', {value}) end"


def _statement(casts: Sequence[str], form: Form, *, as_text: bool = False) -> str:
    # jsonb_to_recordset converts json by the target's type: arrays and composites too. Postgres's text output
    # it would take for json, so that form is cast after it.
    names = [plain(cast) for cast in casts]
    definition = ", ".join(
        f"c{place} {name if form == 'json' else 'text'}" for place, name in enumerate(names)
    )
    selected = ", ".join(f"cast(c{place} as {name})" for place, name in enumerate(names))
    if as_text:
        selected = ", ".join(printed(f"cast(c{place} as {name})") for place, name in enumerate(names))
    return (
        f"select i, {selected} "  # noqa: S608 - names of types, quoted
        f"from pg_catalog.jsonb_to_recordset(cast(:document as pg_catalog.jsonb)) as v (i int, {definition})"
    )


def _document(rows: Sequence[Mapping[str, bytes]], columns: Sequence[str]) -> str:
    lines = []
    for at, row in enumerate(rows):
        members = [
            f'"c{place}":{str(row[column], "utf-8")}' for place, column in enumerate(columns) if column in row
        ]
        lines.append("{" + ",".join([f'"i":{at}', *members]) + "}")
    return f"[{','.join(lines)}]"
