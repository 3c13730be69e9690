"""Values that a person has typed: Postgres judges them, and writes them as it writes its own.

A value that fits no column must be refused before it is kept, not found out by a handler.
"""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from worker.catalogue import ColumnInfo
from worker.errors import Refused
from worker.values.database import is_data_error


async def as_stored(connection: AsyncConnection, column: ColumnInfo, given: str) -> str:
    """Give Postgres's own text of a value of a column.

    Raises:
        Refused: it is none of the column's type.
    """
    statement = text(f"select cast(cast(cast(:given as text) as {column.sql_cast}) as text)")
    try:
        async with connection.begin_nested():
            return str((await connection.execute(statement, {"given": given})).scalar_one())
    except Exception as error:
        if not is_data_error(error):
            raise
        raise Refused(f'the value for "{column.name}" is no {column.sql_type}') from None
