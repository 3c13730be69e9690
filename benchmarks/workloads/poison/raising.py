"""A change handler that is given lists, looks at each change in turn, and raises at the first poison."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import copy, look_at
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", batch=500, name="raising")
async def raising(changes: list[Change], session: AsyncSession) -> None:
    orders = []
    for change in changes:
        row: dict[str, Any] = change.record or {}
        order = (row["id"], row["customer_id"], row["status"], change.source == "redrive")
        orders.append(await look_at(order, session))
    await copy(session, orders)
