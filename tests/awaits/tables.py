"""A table of orders, and handlers that write down what they were given."""

from typing import Any

from sqlalchemy import column, select, table, text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create table orders (id int primary key, owner int not null, amount int not null, version int not null);
alter table orders replica identity full;
create table derived_totals (owner int primary key, orders bigint not null, amount bigint not null);
create table derived_seen (
  seq bigint generated always as identity primary key,
  handler text not null, type text not null, id int, version int, owner int, old_owner int
);
create table derived_poison (id int primary key);
"""

on = Handlers()
_TYPES = ["INSERT", "UPDATE", "DELETE", "TRUNCATE"]
_KEPT = select(column("owner")).select_from(table("derived_totals"))


@on.derive("public.orders", by="owner", name="totals", all_keys=_KEPT)
async def totals(owners: list[int], session: AsyncSession) -> None:
    await session.execute(
        text(
            "insert into derived_totals (owner, orders, amount)"
            " select o, count(t.id), coalesce(sum(t.amount), 0)"
            " from unnest(cast(:owners as int[])) o left join orders t on t.owner = o group by o"
            " on conflict (owner) do update set orders = excluded.orders, amount = excluded.amount"
        ),
        {"owners": owners},
    )


async def _note(handler: str, changes: list[Change], session: AsyncSession) -> None:
    for change in changes:
        row = change.record or change.old_record
        found: dict[str, Any] = {"id": None, "version": None}
        if row is not None:
            found = {"id": row["id"], "version": row["version"]}
        found["owner"] = None if change.record is None else change.record["owner"]
        found["old_owner"] = None if change.old_record is None else change.old_record["owner"]
        await session.execute(
            text(
                "insert into derived_seen (handler, type, id, version, owner, old_owner)"
                " values (:handler, :type, :id, :version, :owner, :old_owner)"
            ),
            found | {"handler": handler, "type": change.type},
        )
        poison = await session.execute(
            text("select 1 from derived_poison where id = :id"), {"id": found["id"]}
        )
        if poison.first() is not None:
            raise ValueError("this order is poison")


@on.change("public.orders", name="by_row", types=_TYPES)
async def by_row(change: Change, session: AsyncSession) -> None:
    """One at a time, in the order of each row."""
    await _note("by_row", [change], session)


@on.change("public.orders", name="by_owner", lane_key="owner", batch=5, types=_TYPES)
async def by_owner(changes: list[Change], session: AsyncSession) -> None:
    """Several at a time, in the order of each owner; a row that changes hands belongs to two."""
    await _note("by_owner", changes, session)


DIFFERENCES = """
select count(*) from (select owner, count(*), sum(amount) from orders group by 1) truth
full join (select owner, orders, amount from derived_totals where orders > 0) derived
on truth = derived where truth is null or derived is null
"""
"""How many totals are not what they should be."""
