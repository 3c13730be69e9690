"""The example handlers on a real Postgres, called as the worker calls them."""

import runpy
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Connection, delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

import handlers.customer_totals
import handlers.order_status_log
from handlers.customer_totals import customer_totals
from handlers.order_status_log import order_status_log
from handlers.tables import CustomerTotal, Derived, Order, OrderStatusLog, Source
from standin.embedded import EmbeddedPostgres
from worker import Change
from worker.catalogue import read_catalogue
from worker.change import Position, Record
from worker.loader import load, validate
from worker.sessions import handler_session

REVISION = Path(handlers.__path__[0]) / "migrations" / "versions" / "0001_derived_tables.py"


def migrate(connection: Connection, direction: str) -> None:
    with Operations.context(MigrationContext.configure(connection)):
        runpy.run_path(str(REVISION))[direction]()


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        engine = create_async_engine(postgres.dsn().replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.begin() as connection:
            await connection.run_sync(Source.metadata.create_all)
            await connection.execute(text("alter table public.orders replica identity full"))
            await connection.execute(text("create publication supabase_realtime for table public.orders"))
            await connection.run_sync(migrate, "upgrade")
        yield engine
        await engine.dispose()


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with engine.begin() as connection:
        await connection.execute(text("truncate orders, customer_totals, order_status_log"))
    async with AsyncSession(engine) as session:
        await session.begin()
        yield session


async def totals(session: AsyncSession) -> dict[int, tuple[int, Decimal]]:
    rows = await session.execute(
        select(CustomerTotal.customer_id, CustomerTotal.orders, CustomerTotal.amount)
    )
    return {customer: (orders, amount) for customer, orders, amount in rows}


async def order(session: AsyncSession, customer_id: int, amount: str) -> int:
    values = {"customer_id": customer_id, "status": "new", "amount": Decimal(amount)}
    return (await session.execute(insert(Order).values(values).returning(Order.id))).scalar_one()


async def test_totals_follow_inserts_updates_and_deletes(session: AsyncSession) -> None:
    first = await order(session, 1, "10.10")
    await order(session, 1, "0.05")
    other = await order(session, 2, "7")
    await customer_totals([1, 2, 3], handler_session(session))
    assert await totals(session) == {1: (2, Decimal("10.15")), 2: (1, Decimal("7.00"))}

    await session.execute(
        update(Order).where(Order.id == first).values(amount=Decimal("20.00"), customer_id=3)
    )
    await session.execute(delete(Order).where(Order.id == other))
    await customer_totals([1, 2, 3], handler_session(session))
    assert await totals(session) == {1: (1, Decimal("0.05")), 3: (1, Decimal("20.00"))}


async def test_only_the_given_customers_are_touched(session: AsyncSession) -> None:
    await order(session, 1, "1")
    await order(session, 2, "2")
    session.add(CustomerTotal(customer_id=2, orders=99, amount=Decimal(99)))
    session.add(CustomerTotal(customer_id=3, orders=99, amount=Decimal(99)))
    await customer_totals([1], handler_session(session))
    assert await totals(session) == {1: (1, Decimal(1)), 2: (99, Decimal(99)), 3: (99, Decimal(99))}


async def test_computing_again_changes_nothing(session: AsyncSession) -> None:
    await order(session, 1, "1.25")
    for customers in ([1], [1], [1, 4]):
        await customer_totals(customers, handler_session(session))
    assert await totals(session) == {1: (1, Decimal("1.25"))}


async def test_the_keys_it_keeps_are_those_of_its_table(session: AsyncSession) -> None:
    await order(session, 5, "1")
    await customer_totals([5], handler_session(session))
    (derive,) = handlers.customer_totals.on.handlers()
    assert derive.all_keys is not None
    assert (await session.scalars(derive.all_keys())).all() == [5]


def change(status: str, old_status: str | None = None) -> Change[Order]:
    row = {"id": 7, "customer_id": 1, "amount": Decimal(1), "created_at": None, "updated_at": None}
    return Change(
        position=Position(1, 0),
        schema="public",
        table="orders",
        type="INSERT" if old_status is None else "UPDATE",
        record=Record({**row, "status": status}),
        old_record=None if old_status is None else Record({**row, "status": old_status}),
        key=(7,),
        commit_timestamp=datetime(2026, 11, 20, 10, tzinfo=UTC),
        model=Order,
    )


async def test_the_log_has_each_status_with_the_one_before(session: AsyncSession) -> None:
    for one in (change("new"), change("paid", "new"), change("sent", "paid")):
        await order_status_log(one, handler_session(session))
        await session.flush()
    rows = (await session.scalars(select(OrderStatusLog).order_by(OrderStatusLog.id))).all()
    assert [(row.order_id, row.old_status, row.new_status) for row in rows] == [
        (7, None, "new"),
        (7, "new", "paid"),
        (7, "paid", "sent"),
    ]
    assert rows[0].changed_at == datetime(2026, 11, 20, 10, tzinfo=UTC)


async def test_the_loader_is_content_with_the_examples(engine: AsyncEngine) -> None:
    found = load(["handlers"])
    assert sorted(handler.name for handler in found) == [
        "handlers.customer_totals:customer_totals",
        "handlers.order_status_log:order_status_log",
    ]
    async with engine.connect() as connection:
        catalogue = await read_catalogue(connection, "supabase_realtime", [("public", "orders")])
    assert validate(found, catalogue, "plain") == []
    assert validate(found, catalogue, "proven") == []


async def test_the_migration_makes_what_the_models_say(engine: AsyncEngine) -> None:
    own = {table.name for table in Derived.metadata.tables.values()}

    def differences(connection: Connection) -> list[object]:
        def derived(name: str | None, kind: str, _parents: object) -> bool:
            wanted = {"schema": {"public"}, "table": own}.get(kind)
            return wanted is None or name in wanted

        context = MigrationContext.configure(
            connection, opts={"include_name": derived, "include_schemas": True, "compare_type": True}
        )
        return list(compare_metadata(context, Derived.metadata))

    # Alembic takes tables of the default schema for tables without one; the models name theirs.
    elsewhere = create_async_engine(
        engine.url, connect_args={"server_settings": {"search_path": "pg_catalog"}}, poolclass=NullPool
    )
    async with elsewhere.connect() as connection:
        assert await connection.run_sync(differences) == []


async def test_the_migration_goes_back(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        await connection.run_sync(migrate, "downgrade")
        left = await connection.scalar(text("select to_regclass('public.customer_totals')"))
        assert left is None
        await connection.run_sync(migrate, "upgrade")
        await connection.rollback()
