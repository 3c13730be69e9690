"""A handler in the midst of its work when a server goes away: it uses both, before and after a while."""

import asyncio

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Context, Handlers

TABLES = """
create table orders (id bigint primary key, customer_id bigint not null, slow boolean not null);
alter table orders replica identity full;
create table derived_log (
  seq bigint generated always as identity primary key,
  order_id bigint not null, customer_id bigint not null, attempt int not null
);
"""
SLOW_SECONDS = 1.0

on = Handlers()
_WRITE = text("insert into derived_log (order_id, customer_id, attempt) values (:id, :customer_id, :attempt)")


@on.change("public.orders", name="log", lane_key="customer_id")
async def log(change: Change, session: AsyncSession, context: Context) -> None:
    row = change.record
    assert row is not None
    await context.redis.incr("outage:begun")
    if row["slow"]:
        await asyncio.sleep(SLOW_SECONDS)
    values = {"id": row["id"], "customer_id": row["customer_id"], "attempt": change.attempt}
    await session.execute(_WRITE, values)
    await context.redis.incr("outage:done")
