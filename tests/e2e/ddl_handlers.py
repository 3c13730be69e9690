"""Handlers of the tests of altered tables: they write down the columns that they were given."""

import json
from decimal import Decimal
from typing import Any

from sqlalchemy import column, select, table, text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

TABLES = """
create type mood as enum ('low', 'high');
create domain even as int check (value % 2 = 0);
create table orders (
  id int primary key, customer_id int not null, amount numeric(12,2) not null default 0, mood mood, pair even
);
alter table orders replica identity full;
create table notes (id int primary key, body text);
create table derived_totals (customer_id text primary key, amount numeric not null);
create table derived_seen (
  seq int generated always as identity, source text not null, type text not null, key text not null,
  record jsonb not null
);
"""

on = Handlers()

KEPT = select(column("customer_id")).select_from(table("derived_totals"))


@on.derive("public.orders", by="customer_id", name="totals", all_keys=KEPT)
async def totals(customer_ids: list[Any], session: AsyncSession) -> None:
    # Whatever type the column has just now: the keys must be values of it.
    for key in customer_ids:
        await session.execute(
            text(
                "insert into derived_totals (customer_id, amount)"
                " select :name, coalesce(sum(amount), 0) from orders where customer_id = :key"
                " on conflict (customer_id) do update set amount = excluded.amount"
            ),
            {"key": key, "name": str(key)},
        )


@on.change("public.orders", name="seen")
@on.change("public.notes")
async def seen(change: Change, session: AsyncSession) -> None:
    row = change.record if change.record is not None else change.old_record
    assert row is not None
    record = {name: [type(value).__name__, _plain(value)] for name, value in row.items()}
    await session.execute(
        text(
            "insert into derived_seen (source, type, key, record)"
            " values (:source, :type, :key, cast(:record as jsonb))"
        ),
        {
            "source": change.table,
            "type": change.type,
            "key": repr(change.key),
            "record": json.dumps(record),
        },
    )


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Decimal) else value
