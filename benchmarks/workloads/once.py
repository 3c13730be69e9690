"""A change handler that counts how often it is given each order: once is right, and nothing else."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES: Final = "create table public.derived_calls (order_id bigint primary key, times int not null);"

on = Handlers()
_STATEMENT: Final = text(
    "insert into derived_calls (order_id, times) select id, 1 from unnest(cast(:ids as bigint[])) id"
    " on conflict (order_id) do update set times = derived_calls.times + 1"
)


@on.insert("public.orders", batch=500, name="once")
async def once(changes: list[Change], session: AsyncSession) -> None:
    orders = [change.record for change in changes if change.record is not None]
    await session.execute(_STATEMENT, {"ids": [order["id"] for order in orders]})
