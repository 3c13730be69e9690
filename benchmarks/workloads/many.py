"""Change handlers on as many tables as the environment says, and as many of them: copies their orders.

Each handler has rows of its own, so that none waits for the row locks of another.
"""

import os
from typing import Any, Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads import BATCH
from worker import Change, Handlers

TABLES_VARIABLE: Final = "BENCHMARK_TABLES"
HANDLERS_VARIABLE: Final = "BENCHMARK_HANDLERS"
MOST_HANDLERS: Final = 64

on = Handlers()
_STATEMENT: Final = text(
    BATCH.format(ids=":ids", customers=":customers", statuses=":statuses", amounts=":amounts")
)


def table(number: int) -> str:
    """Name a table: the first is the one that all benchmarks have."""
    return f"orders_{number}" if number else "orders"


def _add(number: int, tables: int) -> None:
    async def copy(changes: list[Change[Any]], session: AsyncSession) -> None:
        orders = [change.record for change in changes if change.record is not None]
        values = {
            "ids": [order["id"] * MOST_HANDLERS + number for order in orders],
            "customers": [order["customer_id"] for order in orders],
            "statuses": [order["status"] for order in orders],
            "amounts": [order["amount"] for order in orders],
        }
        await session.execute(_STATEMENT, values)

    for at in range(tables):
        copy = on.insert(f"public.{table(at)}", batch=500, name=f"copy-{number}")(copy)


for _number in range(int(os.environ.get(HANDLERS_VARIABLE, "1"))):
    _add(_number, int(os.environ.get(TABLES_VARIABLE, "1")))
