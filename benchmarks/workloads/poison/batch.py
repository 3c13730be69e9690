"""A change handler that is given lists of changes, in the order of their customers, and looks at each."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import copy, look_at
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", batch=500, name="batch")
async def batch(changes: list[Change], session: AsyncSession) -> None:
    orders = []
    for change in changes:
        row: dict[str, Any] = change.record or {}
        order = (row["id"], row["customer_id"], row["status"], change.source == "redrive")
        orders.append(await look_at(order, session))
    await copy(session, orders)
