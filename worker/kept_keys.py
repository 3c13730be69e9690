"""The keys that a derive handler keeps: what its `all_keys=` selects, as lane keys.

Rows may be gone from a table while something derived from them still stands; a backfill and a TRUNCATE
therefore ask the handler. Values are read in the form in which the source of live changes has them: where the
two forms of a type have different canonical texts, the other one would make a second key of each value.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Select, String, case, cast, func, text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.declarations import Handler
from worker.values import Form, canonicalizer, decoder
from worker.values.database import printed
from worker.wal.walsender import TEXT_FORM

PAGE = 1_000


class KeyColumn(NamedTuple):
    """How a column of a key is read."""

    type_name: str
    form: Form

    @classmethod
    def of(cls, type_name: str, form: Form) -> "KeyColumn":
        """Choose the way for a type, where live changes come in a form."""
        differs = form == "text" and decoder(type_name, "text") is None
        return cls(type_name, "text" if differs else "json")

    def shown(self, name: str) -> str:
        """Give the expression for the value of a column of this (quoted) name."""
        return f"to_jsonb({name})::text" if self.form == "json" else printed(name)


async def print_as_the_log(connection: AsyncConnection, columns: Sequence[KeyColumn]) -> None:
    """Have Postgres print values as in the log, if any is read as text, for the rest of the transaction."""
    if any(column.form == "text" for column in columns):
        settings = [f"set_config('{name}', '{value}', true)" for name, value in TEXT_FORM.items()]
        await connection.execute(text(f"select {', '.join(settings)}"))


def lane_keys(rows: Sequence[Sequence[str | None]], columns: Sequence[KeyColumn]) -> list[bytes]:
    """Make lane keys of rows of values as they were read, each once; NULLs belong to no key."""
    forms = [canonicalizer(*column) for column in columns]
    keys: dict[bytes, None] = {}
    for row in rows:
        texts = [
            None if value is None else form(value.encode()) for value, form in zip(row, forms, strict=True)
        ]
        if None not in texts:
            keys[msgspec.json.encode(texts)] = None
    return list(keys)


async def kept_keys(
    connection: AsyncConnection, handler: Handler, columns: Sequence[KeyColumn]
) -> AsyncGenerator[list[bytes], None]:
    """Yield the keys that the handler keeps, page by page; none where it names none.

    Raises:
        sqlalchemy.exc.DBAPIError: the database is away, or the statement does not fit it.
    """
    select = handler.all_keys() if handler.all_keys is not None else None
    if not isinstance(select, Select):
        return
    shown = [
        cast(func.to_jsonb(column), String)
        if way.form == "json"
        else case((func.num_nonnulls(column) == 1, func.format("%s", column)))
        for column, way in zip(select.subquery("kept").c, columns, strict=True)
    ]
    outer: Select[Any] = Select(*shown)
    await print_as_the_log(connection, columns)
    result = await connection.stream(outer)
    async for page in result.partitions(PAGE):
        yield lane_keys(page, columns)
