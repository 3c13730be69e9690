"""Rows behind changes: loaded when asked for, once for a call, in the handler's session and role."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import pytest
from sqlalchemy import BigInteger, ForeignKey, MetaData, event, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from tests.stack import Servers, project
from worker import Change, Handlers
from worker.change import Position, Record
from worker.database import make_engine
from worker.draining.calls import Caller
from worker.errors import SessionMisuse

TABLES = """
create table customers (id bigint primary key, name text);
create table orders (id bigint primary key, customer_id bigint references customers, status text);
create table items (order_id bigint references orders, line int, sku text, primary key (order_id, line));
insert into customers select n, 'customer ' || n from generate_series(1, 20) n;
insert into orders select n, n, 'new' from generate_series(1, 20) n;
insert into items select n, line, 'sku' from generate_series(1, 20) n, generate_series(1, 2) line;
grant select on items, orders to authenticated;
alter table orders enable row level security;
create policy own on orders for select to authenticated
    using (customer_id = (current_setting('request.jwt.claims')::jsonb ->> 'customer')::bigint);
"""


class Base(DeclarativeBase):
    metadata = MetaData(schema="public")


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    name: Mapped[str]


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey("public.customers.id"))
    status: Mapped[str]
    customer: Mapped[Customer] = relationship()
    items: Mapped[list["Item"]] = relationship(order_by="Item.line")


class Item(Base):
    __tablename__ = "items"
    order_id: Mapped[int] = mapped_column(ForeignKey("public.orders.id"), primary_key=True)
    line: Mapped[int] = mapped_column(primary_key=True)
    sku: Mapped[str]


@pytest.fixture(scope="module")
async def engine(shared: Servers) -> AsyncIterator[AsyncEngine]:
    async with project(shared, TABLES, "handlers") as made:
        engine = make_engine(made.database_url, name="test", size=2)
        yield engine
        await engine.dispose()


def order(number: int, **values: Any) -> Change:
    record = Record({"id": number, "customer_id": number, "status": "new"} | values)
    return Change(position=Position(number, 0), schema="public", table="orders", type="INSERT", record=record)


def item(number: int, line: int) -> Change:
    record = Record({"order_id": number, "line": line, "sku": "sku"})
    return Change(
        position=Position(number, line), schema="public", table="items", type="INSERT", record=record
    )


def deleted(number: int) -> Change:
    return Change(
        position=Position(number, 0),
        schema="public",
        table="orders",
        type="DELETE",
        old_record=Record({"id": number}),
    )


async def call(
    engine: AsyncEngine,
    function: Callable[[list[Change], AsyncSession], Coroutine[Any, Any, None]],
    changes: Sequence[Change],
    **options: Any,
) -> list[str]:
    """Call a handler as the drain does; returns the statements that were sent for it."""
    on = Handlers()
    on.change("public.orders", batch=500, **options)(function)
    (handler,) = on.handlers()
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    caller = Caller(handler, timeout=30, policy=None, context=None)  # type: ignore[arg-type] # not asked for here
    event.listen(engine.sync_engine, "before_cursor_execute", note)
    try:
        async with AsyncSession(engine) as session, session.begin():
            await caller.changes(session, changes, str)
            await session.rollback()
    finally:
        event.remove(engine.sync_engine, "before_cursor_execute", note)
    return [statement for statement in sent if "set_config" not in statement]


async def test_rows_of_all_changes_are_one_statement(engine: AsyncEngine) -> None:
    seen: list[Any] = []

    async def handler(changes: list[Change], session: AsyncSession) -> None:
        for change in changes:
            row = await change.row(Order)
            assert row is not None
            assert row in session
            seen.append(row.id)

    sent = await call(engine, handler, [order(n) for n in (3, 1, 2, 3)])
    assert seen == [3, 1, 2, 3]
    assert len(sent) == 1


async def test_nothing_is_loaded_that_nobody_asks_for(engine: AsyncEngine) -> None:
    async def handler(changes: list[Change], session: AsyncSession) -> None: ...

    assert await call(engine, handler, [order(1)]) == []


async def test_related_rows_are_loaded_for_all_at_once(engine: AsyncEngine) -> None:
    seen: list[Any] = []

    async def handler(changes: list[Change], session: AsyncSession) -> None:
        for change in changes:
            items = await change.related(Order.items)
            customer = await change.related(Order.customer)
            assert items is not None
            assert customer is not None
            seen.append(([one.line for one in items], customer.name))

    sent = await call(engine, handler, [order(n) for n in range(1, 21)])
    assert seen == [([1, 2], f"customer {n}") for n in range(1, 21)]
    assert len(sent) == 5  # the orders, and for each relationship its rows and whose they are


async def test_keys_of_several_columns(engine: AsyncEngine) -> None:
    seen: list[Any] = []

    async def handler(changes: list[Change], session: AsyncSession) -> None:
        rows = [await change.row(Item) for change in changes]
        seen.extend(None if row is None else (row.order_id, row.line) for row in rows)

    sent = await call(engine, handler, [item(1, 1), item(2, 2), item(2, 9)])
    assert seen == [(1, 1), (2, 2), None]
    assert len(sent) == 1


async def test_a_row_that_is_gone_is_none(engine: AsyncEngine) -> None:
    async def handler(changes: list[Change], session: AsyncSession) -> None:
        assert await changes[0].row(Order) is None
        assert await changes[0].related(Order.items) is None
        assert await changes[1].row(Order) is not None  # deleted, and made again since

    await call(engine, handler, [deleted(99), deleted(1)])


async def test_rows_are_as_they_are_now(engine: AsyncEngine) -> None:
    async def handler(changes: list[Change], session: AsyncSession) -> None:
        await session.get(Order, 1)
        await session.execute(text("update orders set status = 'paid' where id = 1"))
        row = await changes[0].row(Order)
        assert row is not None
        assert row.status == "paid"

    await call(engine, handler, [order(1, status="new")])


async def test_rows_are_those_that_the_handlers_role_may_see(engine: AsyncEngine) -> None:
    async def handler(changes: list[Change], session: AsyncSession) -> None:
        assert [await change.row(Order) is None for change in changes] == [True, False]

    await call(engine, handler, [order(1), order(2)], role="authenticated", claims={"customer": 2})


async def test_several_tasks_may_ask(engine: AsyncEngine) -> None:
    async def handler(changes: list[Change], session: AsyncSession) -> None:
        rows = await asyncio.gather(*(change.row(Order) for change in changes))
        assert None not in rows

    assert len(await call(engine, handler, [order(n) for n in range(1, 9)])) == 1


async def test_what_has_no_row_says_so(engine: AsyncEngine) -> None:
    truncate = Change(position=Position(1, 0), schema="public", table="orders", type="TRUNCATE")

    async def handler(changes: list[Change], session: AsyncSession) -> None:
        with pytest.raises(ValueError, match=r"a TRUNCATE of public\.orders has no row"):
            await changes[0].row(Order)
        with pytest.raises(ValueError, match="has no row of Customer"):
            await changes[1].row(Customer)
        with pytest.raises(ValueError, match="is no relationship"):
            await changes[1].related(Order.status)
        assert await changes[1].row(Order) is not None

    await call(engine, handler, [truncate, order(1)])


async def test_outside_a_call_there_are_no_rows(engine: AsyncEngine) -> None:
    with pytest.raises(SessionMisuse):
        await order(1).row(Order)
    left: list[asyncio.Task[Any]] = []
    go = asyncio.Event()

    async def handler(changes: list[Change], session: AsyncSession) -> None:
        async def late() -> None:
            await go.wait()
            await changes[0].row(Order)

        left.append(asyncio.create_task(late()))

    await call(engine, handler, [order(1)])
    go.set()
    with pytest.raises(SessionMisuse):
        await left[0]
