"""A derive handler: looks at the orders whose ids it is given, copies them, and names those that fail."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import PoisonError, copy, is_mended, judge
from worker import Context, Handlers

on = Handlers()
_ORDERS: Final = text(
    "select id, customer_id, status from orders where id = any(cast(:ids as bigint[])) order by id"
)


@on.derive("public.orders", by="id", name="derive")
async def derive(ids: list[int], session: AsyncSession, context: Context) -> None:
    mended = await is_mended(session)
    orders = []
    for row in await session.execute(_ORDERS, {"ids": ids}):
        # It is given keys, not changes: whether a person has asked for one, it cannot tell.
        order = (row.id, row.customer_id, row.status, False)
        try:
            orders.append(judge(order, mended=mended))
        except PoisonError as error:
            context.fail(row.id, error)
    await copy(session, orders)
