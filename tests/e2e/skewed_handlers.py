"""A handler that notes which worker called it, and takes its time for each change."""

import os

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create table orders (id bigint primary key, version int not null);
alter table orders replica identity full;
create table derived_log (
  seq bigint generated always as identity primary key, order_id bigint not null, version int not null,
  pid int not null
);
"""
ORDERS = 16
LANES = 128
"""So many more that each order nearly has a lane of its own."""

on = Handlers()


@on.change("public.orders", name="note", batch=500)
async def note(changes: list[Change], session: AsyncSession) -> None:
    rows = [change.record for change in changes if change.record is not None]
    await session.execute(text("select pg_sleep(:seconds)"), {"seconds": 0.06 * len(rows)})
    await session.execute(
        text(
            "insert into derived_log (order_id, version, pid)"
            " select o, v, :pid from unnest(cast(:ids as bigint[]), cast(:versions as int[]))"
            " with ordinality as t (o, v, n) order by n"
        ),
        {
            "ids": [row["id"] for row in rows],
            "versions": [row["version"] for row in rows],
            "pid": os.getpid(),
        },
    )
