"""The shop: makes its tables, and keeps writing orders in transactions of one row and of many.

It knows nothing of Tailrace. In each transaction it also notes every status of an order in a journal outside
the publication, so that afterwards anybody can tell what should have been derived.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from decimal import Decimal

from examples.demo.database import Connection, connect

CUSTOMERS = 200
_TILLS = 4
_MOST_ORDERS = 500
_FEWEST_ORDERS = 20
_CATCH_UP_SECONDS = 3.0
_STATUSES = ("new", "paid", "packed", "sent", "delivered")
_NEXT: dict[str, str] = dict(itertools.pairwise(_STATUSES))

SOURCE = """
create table public.orders (
  id          bigint generated always as identity primary key,
  customer_id bigint not null,
  status      text not null,
  amount      numeric(12,2) not null,
  created_at  timestamptz not null default now(),
  updated_at  timestamptz
);
create index on public.orders (customer_id);
-- What any table needs to be followed: old values, a place in the publication, and a grant.
alter table public.orders replica identity full;
alter publication supabase_realtime add table public.orders;
grant select on public.orders to service_role;

create schema shop;
create table shop.journal (
  id       bigint generated always as identity primary key,
  order_id bigint not null,
  status   text not null
);
"""

# A deferred trigger runs when its transaction commits: it sees how long after the order the derived row came.
STOPWATCH = """
create table shop.lags (
  id      bigint generated always as identity primary key,
  at      timestamptz not null default clock_timestamp(),
  seconds double precision not null
);
create function shop.note_lag() returns trigger language plpgsql as $$
begin
  insert into shop.lags (seconds) values (extract(epoch from clock_timestamp() - new.changed_at));
  return null;
end $$;
create constraint trigger note_lag after insert on public.order_status_log deferrable initially deferred
  for each row when (new.changed_at is not null) execute function shop.note_lag();
"""

_PLACE = """
with placed as (
  insert into public.orders (customer_id, status, amount)
  select customer, 'new', amount from unnest($1::bigint[], $2::numeric[]) as wanted (customer, amount)
  returning id, status
), noted as (insert into shop.journal (order_id, status) select id, status from placed)
select id from placed
"""
_ADVANCE = """
with advanced as (
  update public.orders set status = wanted.status, updated_at = clock_timestamp()
  from unnest($1::bigint[], $2::text[]) as wanted (id, status) where orders.id = wanted.id
  returning orders.id, orders.status
), noted as (insert into shop.journal (order_id, status) select id, status from advanced)
select count(*) from advanced
"""
_REPRICE = "update public.orders set amount = $2, updated_at = clock_timestamp() where id = $1"
_MOVE = "update public.orders set customer_id = $2, updated_at = clock_timestamp() where id = $1"
_REMOVE = "delete from public.orders where id = any($1::bigint[])"


class Shop:
    """Writes so many changes a second until it is closed.

    Attributes:
        counts: committed so far: inserts, updates, deletes, statuses, transactions.
    """

    def __init__(self, url: str, rate: float) -> None:
        self._url = url
        self._rate = rate
        self._closing = asyncio.Event()
        self._opened = self._due_since = time.monotonic()
        self._paced = 0
        self.seconds = 0.0
        self.counts: Counter[str] = Counter()

    @property
    def changes(self) -> int:
        """Rows inserted, updated and deleted so far."""
        return self.counts["inserts"] + self.counts["updates"] + self.counts["deletes"]

    async def run(self) -> None:
        """Keep the shop open until `close`; then every transaction is committed.

        Raises:
            database.GONE: the database went away.
        """
        self._opened = self._due_since = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(_TILLS):
                    group.create_task(self._till(), name=f"shop: till {number}")
        finally:
            self.seconds = time.monotonic() - self._opened

    def close(self) -> None:
        """Take no more orders."""
        self._closing.set()

    async def last_order(self) -> int:
        """Write one more order, after all the others; returns its id."""
        db = await connect(self._url)
        try:
            till = Till(db)
            await till.place(1)
            self.counts += till.written + Counter(transactions=1)
            return till.newest
        finally:
            await db.close()

    async def _till(self) -> None:
        db = await connect(self._url)
        try:
            till = Till(db)
            while not self._closing.is_set():
                if (early := self._early()) > 0:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(early):
                            await self._closing.wait()
                    continue
                till.written.clear()
                await till.act()
                self._paced += till.changes
                self.counts += till.written + Counter(transactions=1)
        finally:
            await db.close()

    def _early(self) -> float:
        """Tell by how many seconds the shop is ahead of its rate."""
        early = self._paced / self._rate - (time.monotonic() - self._due_since)
        if early < -_CATCH_UP_SECONDS:
            # After a long pause of the machine the shop does not make up for all of it at once.
            self._due_since += -_CATCH_UP_SECONDS - early
        return early


class Till:
    """One connection with orders of its own: tills share customers, but never wait for each other."""

    def __init__(self, db: Connection) -> None:
        self._db = db
        self._orders: dict[int, str] = {}
        self._random = random.Random()  # noqa: S311 - a shop's chances, not a secret
        self.written: Counter[str] = Counter()
        self.newest = 0
        # How often each kind of transaction comes, in per cent.
        self._habits: dict[Callable[[], Awaitable[None]], int] = {
            self._one_order: 20,
            self._some_orders: 8,
            self._next_status: 30,
            self._evening: 4,
            self._new_price: 15,
            self._other_customer: 8,
            self._cancel: 10,
            self._errand: 5,
        }

    @property
    def changes(self) -> int:
        """Rows written since `written` was cleared."""
        return self.written["inserts"] + self.written["updates"] + self.written["deletes"]

    async def act(self) -> None:
        """Do one transaction, of one row or of many."""
        if len(self._orders) < _FEWEST_ORDERS:
            await self.place(5)
        elif len(self._orders) > _MOST_ORDERS:
            await self._remove(list(self._orders)[:10])
        else:
            (kind,) = self._random.choices(list(self._habits), list(self._habits.values()))
            await kind()

    # Transactions

    async def _one_order(self) -> None:
        await self.place(1)

    async def _some_orders(self) -> None:
        await self.place(self._random.randint(2, 5))

    async def _next_status(self) -> None:
        await self._advance(1)

    async def _evening(self) -> None:
        await self._advance(self._random.randint(5, 12))

    async def _new_price(self) -> None:
        await self._db.execute(_REPRICE, self._any(), self._amount())
        self.written["updates"] += 1

    async def _other_customer(self) -> None:
        await self._db.execute(_MOVE, self._any(), self._customer())
        self.written["updates"] += 1

    async def _cancel(self) -> None:
        await self._remove([self._any()])

    async def _errand(self) -> None:
        """Several statements in one transaction, some of them about the same row."""
        async with self._db.transaction():
            await self.place(2)
            await self._advance(1, [self.newest])
            await self._advance(1, [self.newest])
            await self._other_customer()
            await self._new_price()
            await self._cancel()

    # Statements

    async def place(self, number: int) -> None:
        """Insert orders."""
        customers = [self._customer() for _ in range(number)]
        rows = await self._db.fetch(_PLACE, customers, [self._amount() for _ in range(number)])
        for (order,) in rows:
            self._orders[order] = self.newest = order
            self._orders[order] = _STATUSES[0]
        self.written += Counter(inserts=number, statuses=number)

    async def _advance(self, number: int, chosen: list[int] | None = None) -> None:
        known = [order for order in chosen or self._orders if self._orders[order] in _NEXT]
        orders = chosen or self._random.sample(known, min(number, len(known)))
        statuses = [_NEXT[self._orders[order]] for order in orders]
        await self._db.execute(_ADVANCE, orders, statuses)
        self._orders.update(zip(orders, statuses, strict=True))
        self.written += Counter(updates=len(orders), statuses=len(orders))

    async def _remove(self, orders: list[int]) -> None:
        await self._db.execute(_REMOVE, orders)
        for order in orders:
            del self._orders[order]
        self.written["deletes"] += len(orders)

    # Chance

    def _any(self) -> int:
        return self._random.choice(list(self._orders))

    def _customer(self) -> int:
        # Some customers order much more than others.
        return 1 + min(int(self._random.expovariate(5 / CUSTOMERS)), CUSTOMERS - 1)

    def _amount(self) -> Decimal:
        return Decimal(self._random.randint(100, 50_000)).scaleb(-2)
