"""The built-in handler that follows a table for the cache: as rows change, what was computed is forgotten.

A derive handler like any other, so that all that holds for those holds for the cache: each change reaches it,
after its transaction can be seen, and a gap is closed by a backfill. Pure; cache.py does the forgetting.
"""

import functools
import re
from collections.abc import Coroutine, Iterable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from worker.context import Context

Table = tuple[str, str]
"""(schema, table)"""


async def _forget(table: Table, keys: list[Any], session: AsyncSession, context: Context) -> None:
    del session
    await context.cache.rows_changed(table, keys)


class Forgetting(functools.partial[Coroutine[Any, Any, None]]):
    """The function of such a handler, which knows its table."""

    @property
    def table(self) -> Table:
        """The table that it follows."""
        table: Table = self.args[0]
        return table


def forgetting(table: Table) -> tuple[Forgetting, str]:
    """Make the function that follows a table, and its name as a handler."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{table[0]}.{table[1]}")
    return Forgetting(_forget, table), f"cache:{name}"[:200]


def cached_tables(functions: Iterable[object]) -> frozenset[Table]:
    """Tell which tables are followed for the cache, by the functions of all handlers."""
    return frozenset(one.table for one in functions if isinstance(one, Forgetting))
