"""Recomputes the derived tables from what the shop wrote, in SQL, and names every difference.

Independent of the handlers: it reads the orders and the shop's journal, never Tailrace's own tables.
"""

from dataclasses import dataclass

from examples.demo.database import Connection

_TOTALS = """
with truth as (
  select customer_id, count(*)::int as orders, sum(amount) as amount from public.orders group by customer_id
), pairs as (
  select customer_id as key,
    (truth.orders, truth.amount) as expected, (derived.orders, derived.amount) as found
  from truth full join public.customer_totals derived using (customer_id)
)
"""

# Each status with the one before it, in order: once too often, missing, swapped, all of it shows.
_STATUSES = """
with truth as (
  select order_id, array_agg(step order by id) as steps from (
    select id, order_id,
      concat_ws(' to ', lag(status) over (partition by order_id order by id), status) as step
    from shop.journal) steps group by order_id
), derived as (
  select order_id, array_agg(concat_ws(' to ', old_status, new_status) order by id) as steps
  from public.order_status_log group by order_id
), pairs as (
  select order_id as key, truth.steps as expected, derived.steps as found
  from truth full join derived using (order_id)
)
"""

_COUNT = (
    "select count(*) filter (where expected is not null) as keys,"
    " count(*) filter (where expected is distinct from found) as wrong,"
    " (array_agg(key order by key) filter (where expected is distinct from found))[:10] as examples"
    " from pairs"
)


@dataclass(frozen=True)
class Compared:
    """One derived table beside what it should be.

    Attributes:
        table: its name.
        what: what its keys are, in the plural.
        keys: how many there should be.
        wrong: how many differ.
        examples: up to ten of those.
    """

    table: str
    what: str
    keys: int
    wrong: int
    examples: tuple[int, ...] = ()

    def __str__(self) -> str:
        if not self.wrong:
            return f"{self.table}: {self.keys:,} {self.what}, all equal"
        listed = ", ".join(map(str, self.examples)) + (", …" if self.wrong > len(self.examples) else "")
        return f"{self.table}: {self.wrong:,} of {self.keys:,} {self.what} DIFFER: {listed}"


async def compare(db: Connection) -> list[Compared]:
    """Compare both derived tables with the truth."""
    return [
        await _compare(db, _TOTALS, "customer_totals", "customers"),
        await _compare(db, _STATUSES, "order_status_log", "orders"),
    ]


async def _compare(db: Connection, pairs: str, table: str, what: str) -> Compared:
    row = await db.fetchrow(pairs + _COUNT)
    return Compared(table, what, row["keys"], row["wrong"], tuple(row["examples"] or ()))
