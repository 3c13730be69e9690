"""A derive handler: looks at the orders whose ids it is given, and copies them."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import copy, look_at
from worker import Handlers

on = Handlers()
_ORDERS: Final = text(
    "select id, customer_id, status from orders where id = any(cast(:ids as bigint[])) order by id"
)


@on.derive("public.orders", by="id", name="derive")
async def derive(ids: list[int], session: AsyncSession) -> None:
    rows = await session.execute(_ORDERS, {"ids": ids})
    # It is given keys, not changes: whether a person has asked for one, it cannot tell.
    orders = [(row.id, row.customer_id, row.status, False) for row in rows]
    await copy(session, [await look_at(order, session) for order in orders])
