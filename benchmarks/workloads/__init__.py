"""What the drain benchmark lets the daemon do: the same derived rows by each kind of handler, one per module.

Each module is served alone, as HANDLERS. The table is an order's copy, so that all kinds do the same work.
"""

from typing import Final

TABLES: Final = """
create table public.derived_orders (
  order_id    bigint primary key,
  customer_id bigint not null,
  status      text not null,
  amount      numeric(12,2) not null
);
"""

# Parameters in each driver's own form: SQLAlchemy's names for the daemon, asyncpg's numbers for the floor.
DERIVE: Final = """
insert into derived_orders (order_id, customer_id, status, amount)
select id, customer_id, status, amount from orders where id = any(cast({ids} as bigint[]))
on conflict (order_id) do update
set customer_id = excluded.customer_id, status = excluded.status, amount = excluded.amount
"""
BATCH: Final = """
insert into derived_orders (order_id, customer_id, status, amount)
select * from unnest(
  cast({ids} as bigint[]), cast({customers} as bigint[]), cast({statuses} as text[]),
  cast({amounts} as numeric[])
)
on conflict (order_id) do update
set customer_id = excluded.customer_id, status = excluded.status, amount = excluded.amount
"""
SINGLE: Final = """
insert into derived_orders (order_id, customer_id, status, amount)
values ({id}, {customer}, {status}, {amount})
on conflict (order_id) do update
set customer_id = excluded.customer_id, status = excluded.status, amount = excluded.amount
"""
