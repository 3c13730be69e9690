"""A derive handler: keeps the total of each customer, however many of them there are."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Handlers

on = Handlers()
_STATEMENT: Final = text(
    "insert into derived_orders (order_id, customer_id, status, amount)"
    " select customer_id, customer_id, 'total', sum(amount) from orders"
    " where customer_id = any(cast(:ids as bigint[])) group by customer_id"
    " on conflict (order_id) do update set amount = excluded.amount"
)


@on.derive("public.orders", by="customer_id", name="keys")
async def total(ids: list[int], session: AsyncSession) -> None:
    await session.execute(_STATEMENT, {"ids": ids})
