"""A change handler that is given lists of changes: copies their orders in one statement."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads import BATCH
from worker import Change, Handlers

on = Handlers()
_STATEMENT: Final = text(
    BATCH.format(ids=":ids", customers=":customers", statuses=":statuses", amounts=":amounts")
)


@on.insert("public.orders", batch=500, name="batch")
async def copy(changes: list[Change], session: AsyncSession) -> None:
    orders = [change.record for change in changes if change.record is not None]
    values = {
        "ids": [order["id"] for order in orders],
        "customers": [order["customer_id"] for order in orders],
        "statuses": [order["status"] for order in orders],
        "amounts": [order["amount"] for order in orders],
    }
    await session.execute(_STATEMENT, values)
