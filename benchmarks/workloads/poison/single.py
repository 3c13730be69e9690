"""A change handler that is given one change at a time, in the order of its customer."""

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import copy
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", name="single")
async def single(change: Change, session: AsyncSession) -> None:
    order = change.record
    assert order is not None
    again = change.source == "redrive"
    await copy(session, [(order["id"], order["customer_id"], order["status"], again)])
