"""Handlers of the tests that restart everything: in batches, so that 50,000 changes take seconds."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create table orders (id bigint primary key, customer_id bigint not null, version int not null);
alter table orders replica identity full;
create table derived_log (
  seq bigint generated always as identity primary key, order_id bigint not null, version int not null
);
create table derived_totals (customer_id bigint primary key, versions bigint not null);
"""

on = Handlers()


@on.change("public.orders", name="log", batch=500)
async def log(changes: list[Change], session: AsyncSession) -> None:
    rows = [change.record for change in changes if change.record is not None]
    await session.execute(
        text(
            "insert into derived_log (order_id, version)"
            " select o, v from unnest(cast(:ids as bigint[]), cast(:versions as int[]))"
            " with ordinality as t (o, v, n) order by n"
        ),
        {"ids": [row["id"] for row in rows], "versions": [row["version"] for row in rows]},
    )


@on.derive("public.orders", by="customer_id", name="totals")
async def totals(customers: list[int], session: AsyncSession) -> None:
    await session.execute(
        text(
            "insert into derived_totals (customer_id, versions) select customer_id, sum(version) from orders"
            " where customer_id = any(cast(:ids as bigint[])) group by 1"
            " on conflict (customer_id) do update set versions = excluded.versions"
        ),
        {"ids": customers},
    )


WRONG = """
select (select count(*) from derived_log) - (select sum(version) from orders)
  + (select count(*) from (
    select version - lag(version, 1, 0) over (partition by order_id order by seq) as step from derived_log
  ) steps where step <> 1)
"""
"""0 where each change of each order was logged once, and in the order of its commits."""

DIFFERENT = """
select count(*) from (select customer_id, sum(version) as versions from orders group by 1) truth
full join derived_totals derived using (customer_id)
where truth.versions is distinct from derived.versions
"""
"""How many customers' totals are not what they should be."""
