"""A change handler that is given lists of changes, in the order of their customers."""

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import copy
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", batch=500, name="batch")
async def batch(changes: list[Change], session: AsyncSession) -> None:
    orders = [(change.record, change.source == "redrive") for change in changes if change.record is not None]
    await copy(session, [(row["id"], row["customer_id"], row["status"], again) for row, again in orders])
