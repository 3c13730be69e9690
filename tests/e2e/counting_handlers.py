"""Handlers for tests of counters: one is given every order, the other those that are paid."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create table orders (id bigint primary key, status text not null);
alter table orders replica identity full;
create table derived_log (seq bigint generated always as identity primary key, handler text, id bigint);
"""

on = Handlers()


async def log(change: Change, session: AsyncSession, handler: str) -> None:
    row = change.record or change.old_record
    assert row is not None
    values = {"handler": handler, "id": row["id"]}
    await session.execute(text("insert into derived_log (handler, id) values (:handler, :id)"), values)


@on.change("public.orders", name="all")
async def all_orders(change: Change, session: AsyncSession) -> None:
    await log(change, session, "all")


@on.change("public.orders", name="paid", filter="status=eq.paid")
async def paid(change: Change, session: AsyncSession) -> None:
    await log(change, session, "paid")
