"""Under which schema a change was written: its list of columns, held against pictures of its table.

Pure. The catalogue shows tables as they are at one moment; a change is older or newer than that. What it
lists itself is true of its own moment, and decides here.
"""

from collections.abc import Sequence

from worker.catalogue import ColumnInfo, Table
from worker.change import Column


def is_of_type(info: ColumnInfo, column: Column) -> bool:
    """Tell whether a column of the catalogue still has the type of a payload's column.

    By its object id where both are known: a type may have got another name since, and another type its name.
    """
    if info.type_oid and column.type_oid:
        return info.type_oid == column.type_oid
    return info.type == column.type


def fits(table: Table, columns: Sequence[Column]) -> bool:
    """Tell whether a change with these columns can have been written when the table looked like this."""
    known = table.columns
    return {column.name for column in columns}.issuperset(table.primary_key) and all(
        column.name in known and is_of_type(known[column.name], column) for column in columns
    )


def written_under(tables: Sequence[Table], columns: Sequence[Column]) -> Table | None:
    """Choose the picture under which a change was written.

    Args:
        tables: pictures of its table, newest first.
        columns: as the change lists them.

    Returns:
        The newest that fits, else the newest whose primary key the change has; None where there is neither.
    """
    names = {column.name for column in columns}
    having_key = [table for table in tables if table.primary_key and names.issuperset(table.primary_key)]
    return next(
        (table for table in having_key if fits(table, columns)), having_key[0] if having_key else None
    )


def key_of(tables: Sequence[Table], columns: Sequence[Column]) -> tuple[str, ...]:
    """Name the columns of the primary key as they were called when a change was written.

    Where no picture tells, what the log itself says of it; of several columns it does not tell the order, and
    is not believed. Then what was written down of earlier keys. Without any of these it is today's, which the
    change then does not carry.
    """
    table = written_under(tables, columns)
    if table is not None:
        return table.primary_key
    said = tuple(column.name for column in columns if column.key)
    if len(said) == 1:
        return said
    names = {column.name for column in columns}
    for earlier in (key for table in tables for key in table.earlier_keys):
        if earlier and names.issuperset(earlier):
            return earlier
    return tables[0].primary_key if tables else ()
