"""A change handler that is given one change at a time: copies its order."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads import SINGLE
from worker import Change, Handlers

on = Handlers()
_STATEMENT: Final = text(SINGLE.format(id=":id", customer=":customer", status=":status", amount=":amount"))


@on.insert("public.orders", name="single")
async def copy(change: Change, session: AsyncSession) -> None:
    order = change.record
    assert order is not None
    values = {
        "id": order["id"],
        "customer": order["customer_id"],
        "status": order["status"],
        "amount": order["amount"],
    }
    await session.execute(_STATEMENT, values)
