"""Tables altered under running processes: each change is read as it was written, and nothing is lost."""

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.e2e import ddl_handlers as handlers
from tests.stack import Project, Servers, project

DIFFERENCES = """
select count(*) from (select customer_id::text, sum(amount) from orders group by 1) truth
full join (select customer_id, amount from derived_totals where amount > 0) derived
on truth = derived where truth is null or derived is null
"""
_numbers = itertools.count(1)


class Shop:
    """A project with its processes; `gaps` are those that were expected."""

    def __init__(self, made: Project) -> None:
        self.made = made
        self.db = made.db
        self.seen: list[int] = []

    async def run(self, statement: str) -> None:
        await self.db.execute(statement)

    async def next(self) -> tuple[str, str, str, dict[str, Any]]:
        """Wait for the next change that the handler was given."""
        await self.made.until(f"select count(*) > {len(self.seen)} from derived_seen", value=True)
        # Not by how many there were: of two lanes, the one that took the lower number may commit later.
        source, kind, key, told, number = await self.db.fetchrow(
            "select source, type, key, record, seq from derived_seen"
            " where seq <> all($1) order by seq limit 1",
            self.seen,
        )
        self.seen.append(number)
        return source, kind, key, {name: value for name, (_, value) in json.loads(told).items()}

    async def settled(self) -> None:
        await self.made.until(DIFFERENCES, 0)

    async def gap(self, cause: str) -> None:
        """Wait until there is a gap of this cause."""
        await self.made.until(f"select count(*) > 0 from tailrace.gaps where cause = '{cause}'", value=True)

    async def gaps(self) -> list[str]:
        """Name the causes of gaps since the last time, waiting for one."""
        await self.made.until("select count(*) > 0 from tailrace.gaps", value=True)
        causes = [row[0] for row in await self.db.fetch("select cause from tailrace.gaps order by id")]
        await self.made.until("select count(*) from tailrace.backfills where state <> 'done'", 0)
        await self.db.execute("delete from tailrace.gaps")
        return causes

    async def no_gap(self) -> None:
        assert await self.db.fetch("select cause, tables from tailrace.gaps") == []


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Shop]:
    slot = f"altered_{next(_numbers)}"
    settings = {"WORKER_DELIVERY": "proven", "WORKER_SLOT": slot, "WORKER_BACKOFF_SECONDS": "0.1"}
    async with project(shared, handlers.TABLES, "tests.e2e.ddl_handlers", **settings) as made:
        listener = await made.listener(wait=False)
        await listener.said("listening")
        await made.worker()
        yield Shop(made)
        ended = [process.name for process in made.processes if process.process.returncode is not None]
        await made.kill_all(slot)
        assert not ended
        assert all("Traceback" not in process.text for process in made.processes)


async def test_columns_and_types_altered_between_changes(shop: Shop) -> None:
    await shop.run("insert into orders values (1, 7, 10, 'low', 2)")
    assert await shop.next() == (
        "orders",
        "INSERT",
        "(1,)",
        {"id": 1, "customer_id": 7, "amount": "10.00", "mood": "low", "pair": 2},
    )
    # A column more, of a type that is new as well, and a change of it in the same transaction.
    await shop.run(
        "begin; create domain odd as int check (value % 2 = 1); alter table orders add extra odd default 3;"
        "insert into orders values (2, 7, 5, 'high', 4); commit"
    )
    *_, record = await shop.next()
    assert (record["extra"], record["pair"]) == (3, 4)
    # Types by other names are the same types.
    await shop.run("alter type mood rename to feeling; alter domain even rename to paired")
    await shop.run("insert into orders values (3, 7, 5, 'high', 6, 5)")
    *_, record = await shop.next()
    assert (record["mood"], record["pair"], record["extra"]) == ("high", 6, 5)
    # The key by another name.
    await shop.run("alter table orders rename id to number; update orders set amount = 11 where number = 1")
    _, kind, key, record = await shop.next()
    assert (kind, key, record["number"], record["amount"]) == ("UPDATE", "(1,)", 1, "11.00")
    # Types of the key, and of what handlers compute by.
    await shop.run(
        "alter table orders alter number type text using 'n' || number, alter customer_id type text"
    )
    await shop.run("insert into orders values ('n4', 'seven', 1, null, null, 1)")
    _, _, key, record = await shop.next()
    assert (key, record["customer_id"]) == ("('n4',)", "seven")
    await shop.run("alter table orders drop column extra, drop column mood")
    await shop.run("delete from orders where number = 'n2'")
    _, kind, key, record = await shop.next()
    assert (kind, key, record) == (
        "DELETE",
        "('n2',)",
        {"number": "n2", "customer_id": "7", "amount": "5.00", "pair": 4},
    )
    await shop.settled()
    await shop.no_gap()


async def test_a_key_renamed_while_nobody_listens_is_still_the_key(shop: Shop) -> None:
    await shop.run("insert into orders values (1, 7, 10)")
    await shop.next()
    for process in shop.made.processes:
        await process.kill()
    shop.made.processes.clear()
    await shop.run("insert into orders values (2, 7, 5); delete from orders where id = 1")
    await shop.run("alter table orders rename id to number; insert into orders values (3, 8, 5)")
    listener = await shop.made.listener(wait=False)
    await listener.said("listening")
    await shop.made.worker()
    found = {(kind, key) for _, kind, key, _ in [await shop.next() for _ in range(3)]}
    assert found == {("INSERT", "(2,)"), ("DELETE", "(1,)"), ("INSERT", "(3,)")}
    await shop.settled()
    await shop.no_gap()


async def test_another_primary_key_is_followed(shop: Shop) -> None:
    await shop.run("insert into notes values (1, 'a')")
    assert (await shop.next())[2] == "(1,)"
    await shop.run(
        "alter table notes drop constraint notes_pkey, add code int default 100, add primary key (code)"
    )
    await shop.made.processes[0].said("tables were altered")
    await shop.run("insert into notes values (2, 'b', 200)")
    assert (await shop.next())[2] == "(200,)"
    await shop.no_gap()


async def test_old_values_that_no_longer_come_are_a_gap_and_one_line(shop: Shop) -> None:
    await shop.run("insert into orders values (1, 7, 10), (2, 8, 20)")
    await shop.settled()
    await shop.run("alter table orders replica identity default")
    for amount in range(20):
        await shop.run(f"update orders set customer_id = 9, amount = {amount + 1} where id = 1")
    assert set(await shop.gaps()) == {
        'a change could not be routed to totals: by= needs "customer_id", which the UPDATE does not carry'
    }
    listener = shop.made.processes[0]
    said = await listener.said("a handler does not fit the database any more")
    assert "replica identity full" in said["problem"]
    assert len([line for line in listener.lines if line["message"] == "change cannot be routed"]) == 1
    await shop.settled()
    await shop.run("alter table orders replica identity full")
    await listener.said("tables were altered", times=2)
    await shop.run("update orders set customer_id = 8 where id = 1")
    await shop.settled()
    await shop.no_gap()


async def test_a_column_that_handlers_need_is_gone(shop: Shop) -> None:
    await shop.run("insert into orders values (1, 7, 10)")
    await shop.settled()
    listener = shop.made.processes[0]
    await shop.run("alter table orders rename customer_id to client_id")
    await shop.run("insert into orders values (2, 7, 5)")
    lost = await listener.said("change cannot be routed")
    assert lost["reason"] == (
        'by= needs "customer_id", which public.orders does not have (dropped or renamed?)'
    )
    assert "customer_id" in (await listener.said("a handler does not fit the database any more"))["problem"]
    await listener.said("backfill cannot be made yet")
    # The other handler does not need it.
    assert [(await shop.next())[3].get("client_id") for _ in range(2)] == [None, 7]
    await shop.run("alter table orders rename client_id to customer_id")
    await shop.run("insert into orders values (3, 8, 1)")
    await shop.settled()
    assert len(await shop.gaps()) == 1


async def test_a_table_renamed_dropped_and_made_again(shop: Shop) -> None:
    listener = shop.made.processes[0]
    await shop.run("insert into orders values (1, 7, 10); insert into notes values (1, 'a')")
    await shop.next()
    await shop.next()
    await shop.settled()
    # Under another name for less than a tick: what is written meanwhile is missed by nobody.
    await shop.run(
        "alter table orders rename to purchases; insert into purchases values (2, 7, 5);"
        "alter table purchases rename to orders"
    )
    lost = await listener.said("change cannot be routed", times=2)
    assert lost["reason"] == "public.orders was renamed to public.purchases"
    await shop.settled()
    await shop.gaps()
    # Dropped and made again, in a different shape.
    await shop.run("drop table orders")
    await listener.said("a handler does not fit the database any more", times=2)
    # That is told before the publication is looked at: made again by then, the table had never left it.
    await shop.gap("the publication was changed")
    await shop.run("insert into notes values (2, 'b')")
    assert (await shop.next())[3]["id"] == 2
    await shop.run(
        "create table orders (id bigint primary key, amount numeric not null, customer_id int, remark text);"
        "alter table orders replica identity full; insert into orders values (5, 3, 12);"
        "alter publication supabase_realtime add table orders; insert into orders values (6, 4, 7, 'new')"
    )
    _, _, key, record = await shop.next()
    assert (key, record) == ("(6,)", {"id": 6, "amount": "4", "customer_id": 7, "remark": "new"})
    # What the first gap asked for may be read from the new table before its return is seen.
    await shop.gap("the table was not in the publication for a while")
    await shop.settled()
    assert "the publication was changed" in await shop.gaps()


async def test_the_publication_is_made_anew_and_a_table_leaves_it(shop: Shop) -> None:
    await shop.run("insert into orders values (1, 7, 10)")
    await shop.settled()
    await shop.run(
        "drop publication supabase_realtime; insert into orders values (2, 7, 5);"
        "create publication supabase_realtime for table orders, notes, tailrace.canary"
    )
    await shop.settled()
    assert await shop.gaps() == ["the publication was changed"]
    await shop.run("alter publication supabase_realtime drop table orders")
    assert await shop.gaps() == ["the publication was changed"]
    await shop.run(
        "insert into orders values (3, 8, 5); alter publication supabase_realtime add table orders"
    )
    assert await shop.gaps() == ["the table was not in the publication for a while"]
    await shop.run("insert into orders values (4, 9, 5)")
    await shop.settled()
    await shop.no_gap()


async def test_a_truncate_reaches_what_was_derived_without_a_gap(shop: Shop) -> None:
    await shop.run("insert into orders select n, n, 10 from generate_series(1, 50) n")
    await shop.settled()
    await shop.run("begin; truncate orders; insert into orders values (1, 7, 5); commit")
    await shop.settled()
    assert await shop.db.fetchval("select count(*) from derived_totals where amount > 0") == 1
    await shop.no_gap()
