"""What a module of handlers may look like: pyright must find nothing to complain about. Never run."""

from collections.abc import Sequence
from typing import assert_type

from sqlalchemy import column, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from worker import Change, Context, GiveUp, Handlers, RetryLater

on = Handlers()


@on.derive("public.orders", by="customer_id")
async def totals(customer_ids: list[int], session: AsyncSession) -> None: ...


@on.derive("public.orders", by=("customer_id", "region"), batch=100, all_keys=select(column("customer_id")))
async def by_region(keys: list[tuple[int, str]], session: AsyncSession, context: Context) -> None: ...


@on.derive("public.orders", all_keys=lambda: select(column("id")), columns=["amount"])
async def by_primary_key(keys: Sequence[int], session: AsyncSession) -> None: ...


@on.insert("public.orders")
@on.update("public.orders", columns=["status"])
async def log_status(change: Change, session: AsyncSession) -> None:
    if change.record is None:
        raise GiveUp("an insert or update has a record")
    if not change.changed("status"):
        raise RetryLater(5)
    session.add(change)


@on.change(
    "public.orders", filter="status=eq.paid", batch=500, lane_key="customer_id", types=["INSERT", "TRUNCATE"]
)
async def ship(changes: list[Change], session: AsyncSession) -> None: ...


@on.delete("public.orders", batch=10)
async def forget(changes: Sequence[Change], session: AsyncSession, context: Context) -> None: ...


@on.insert(
    "public.orders",
    name="options",
    filter="status=eq.paid",
    lane_key=["customer_id", "region"],
    max_attempts=3,
    backoff=0.5,
    backoff_max=60,
    timeout=5,
    role="authenticated",
    claims={"sub": "1"},
)
async def with_options(change: Change, session: AsyncSession, context: Context | None = None) -> None: ...


class Base(DeclarativeBase): ...


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    customer: Mapped[Customer] = relationship()
    customers: Mapped[list[Customer]] = relationship()


async def rows_have_the_type_of_their_model(change: Change) -> None:
    assert_type(change.as_(Order), Order)
    assert_type(await change.row(Order), Order | None)
    assert_type(await change.related(Order.customer), Customer | None)
    assert_type(await change.related(Order.customers), list[Customer] | None)


@on.update("public.orders", columns=["status"], name="typed")
async def with_typed_rows(change: Change[Order], session: AsyncSession) -> None:
    assert_type(change.as_(), Order)
    assert_type(change.old_as(), Order | None)
    assert_type(await change.row(), Order | None)
    assert_type(change.as_(Customer), Customer)
    await rows_have_the_type_of_their_model(change)
    await takes_any(change)


@on.change("public.orders", batch=10, name="many typed")
async def with_many_typed_rows(changes: list[Change[Order]], session: AsyncSession) -> None:
    for change in changes:
        assert_type(change.as_(), Order)


async def takes_any(change: Change) -> None: ...


async def decorators_keep_the_type_of_the_function(session: AsyncSession, change: Change) -> None:
    assert_type(await totals([1, 2], session), None)
    assert_type(await log_status(change, session), None)
    assert_type(await ship([change], session), None)
    await with_options(change=change, session=session)
    await totals(customer_ids=[1], session=session)
