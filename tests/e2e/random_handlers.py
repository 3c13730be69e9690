"""Handlers for tests in which much happens at random: how many attempts fail stands in the order."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create table orders (
  id bigint primary key,
  customer_id bigint not null,
  fails int not null default 0
);
alter table orders replica identity full;
create table derived_log (
  seq bigint generated always as identity primary key,
  handler text not null, lsn bigint not null, ordinal bigint not null,
  customers bigint[] not null, source text not null
);
create table derived_mended (since timestamptz default now());
"""

on = Handlers()
_WRITE = text(
    "insert into derived_log (handler, lsn, ordinal, customers, source)"
    " values (:handler, :lsn, :ordinal, :customers, :source)"
)


async def write(handler: str, change: Change, session: AsyncSession) -> None:
    rows = [row for row in (change.record, change.old_record) if row is not None]
    customers = sorted({row["customer_id"] for row in rows})
    place = {"lsn": change.position.lsn, "ordinal": change.position.ordinal}
    await session.execute(
        _WRITE, {"handler": handler, "customers": customers, "source": change.source} | place
    )
    if change.attempt <= rows[0]["fails"]:
        mended = await session.execute(text("select 1 from derived_mended"))
        if mended.first() is None:
            raise ValueError("not yet")


@on.change("public.orders", name="goes_on", lane_key="customer_id")
async def goes_on(change: Change, session: AsyncSession) -> None:
    await write("goes_on", change, session)


@on.change("public.orders", name="halts", lane_key="customer_id", after="halt")
async def halts(change: Change, session: AsyncSession) -> None:
    await write("halts", change, session)
