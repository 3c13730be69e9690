"""A change handler that is given lists of changes, in the order of customers, and names those that fail."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import PoisonError, copy, is_mended, judge
from worker import Change, Context, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", batch=500, name="batch")
async def batch(changes: list[Change], session: AsyncSession, context: Context) -> None:
    mended = await is_mended(session)
    orders = []
    for change in changes:
        if context.is_held(change):
            continue
        row: dict[str, Any] = change.record or {}
        order = (row["id"], row["customer_id"], row["status"], change.source == "redrive")
        try:
            orders.append(judge(order, mended=mended))
        except PoisonError as error:
            context.fail(change, error)
    await copy(session, orders)
