"""A change handler that is given one change at a time, in the order of its customer."""

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import copy, look_at
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", name="single")
async def single(change: Change, session: AsyncSession) -> None:
    row = change.record
    assert row is not None
    order = (row["id"], row["customer_id"], row["status"], change.source == "redrive")
    await copy(session, [order])
    await look_at(order, session)
