"""Rows read again by primary key, in one statement for a batch, as they are now.

The keys go to Postgres as they came; the values come back typed. A table that was altered in the meantime is
no error: the columns that still exist are read, and what cannot be read is told.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker.catalogue import ColumnInfo, Table, quote
from worker.values.database import is_data_error, plain, printed
from worker.values.decoding import decoder
from worker.values.scalars import JSONS, parse_json

_THROUGH_JSON: Final = frozenset({"_json", "_jsonb", "hstore"})

GONE: Final = "the source left it out, and the row is gone"
ALTERED: Final = "the source left it out, and it cannot be read again: the table was altered"


class Reread(NamedTuple):
    """Rows in the order of the keys, None where there is none, and the reason for that in words."""

    rows: list[dict[str, Any] | None]
    reason: str


async def read_again(
    session: AsyncSession, table: Table, keys: Sequence[Mapping[str, bytes]], columns: Sequence[str]
) -> Reread:
    """Read columns of rows by primary key.

    Args:
        session: in a transaction; a savepoint is set.
        table: the table, with a primary key.
        keys: per row the values of the primary key, as JSON texts.
        columns: which columns; those that the catalogue no longer has are left out.
    """
    wanted = [table.columns[name] for name in columns if name in table.columns]
    distinct: dict[str, int] = {}
    places = [distinct.setdefault(_members(table, key), len(distinct)) for key in keys]
    members = ",".join(f'{{"i":{place},{key}}}' for key, place in distinct.items())
    document = f"[{members}]"
    for as_text in (False, True):
        try:
            async with session.begin_nested():
                statement = text(_statement(table, wanted, as_text=as_text))
                found = (await session.execute(statement, {"document": document})).all()
        except Exception as error:
            if not is_data_error(error):
                raise
            continue
        readers = [_reader(column, as_text=as_text) for column in wanted]
        rows = {row[0]: _row(wanted, readers, row) for row in found}
        return Reread([rows.get(place) for place in places], GONE)
    return Reread([None] * len(keys), ALTERED)


def _row(
    wanted: Sequence[ColumnInfo], readers: Sequence[Callable[[Any], Any] | None], row: Sequence[Any]
) -> dict[str, Any]:
    return {
        column.name: value if reader is None or value is None else reader(value)
        for column, reader, value in zip(wanted, readers, row[1:], strict=True)
    }


def _members(table: Table, key: Mapping[str, bytes]) -> str:
    members = []
    for place, name in enumerate(table.primary_key):
        value = str(key[name], "utf-8")
        if table.columns[name].value_type == "bytea" and not value.startswith('"\\'):
            # Realtime's bytea has no \x, without which Postgres would read it as plain characters.
            value = '"\\\\x' + value[1:]
        members.append(f'"k{place}":{value}')
    return ",".join(members)


def _statement(table: Table, wanted: Sequence[ColumnInfo], *, as_text: bool) -> str:
    keys = [plain(table.columns[name].sql_cast) for name in table.primary_key]
    definition = ", ".join(f"k{place} {cast}" for place, cast in enumerate(keys))
    joined = " and ".join(
        f"t.{plain(quote(name))} = v.k{place}" for place, name in enumerate(table.primary_key)
    )
    selected = "".join(f", {_selected(column, as_text=as_text)}" for column in wanted)
    return (
        f"select v.i{selected} "  # noqa: S608 - identifiers, quoted
        f"from pg_catalog.jsonb_to_recordset(cast(:document as pg_catalog.jsonb)) as v (i int, {definition}) "
        f"join {plain(table.sql_name)} t on {joined}"
    )


def _selected(column: ColumnInfo, *, as_text: bool) -> str:
    name = f"t.{plain(quote(column.name))}"
    # How json arrives depends on the engine's codecs; as text it does not.
    if column.value_type in JSONS:
        return f"cast({name} as text)"
    if column.value_type in _THROUGH_JSON:
        return f"cast(pg_catalog.to_jsonb({name}) as text)"
    return printed(name) if as_text else name


def _reader(column: ColumnInfo, *, as_text: bool) -> Callable[[Any], Any] | None:
    """Give what is still to be done to a value that asyncpg gave, or None."""
    kind = column.value_type
    if kind in JSONS or kind in _THROUGH_JSON:
        return parse_json
    if as_text:
        decode = decoder(kind, "text")
        return None if decode is None else lambda value: decode(value.encode())
    return None
