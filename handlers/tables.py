"""The tables of the example: what the handlers read, and what they keep.

No handlers here, and no DDL: derived tables are made by migrations/, source tables by the application.
"""

from datetime import datetime
from decimal import Decimal

from sqlalchemy import BigInteger, DateTime, Identity, Integer, MetaData, Numeric, Text, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Source(DeclarativeBase):
    """Base of the application's own tables, which handlers only read."""

    metadata = MetaData(schema="public")


class Derived(DeclarativeBase):
    """Base of what handlers write. Separate metadata, so that Alembic compares only these."""

    metadata = MetaData(schema="public")


class Order(Source):
    """An order of the shop. The table has REPLICA IDENTITY FULL, so that changes carry old values."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    customer_id: Mapped[int] = mapped_column(BigInteger)
    status: Mapped[str] = mapped_column(Text)
    amount: Mapped[Decimal] = mapped_column(Numeric(12, 2))
    created_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True), server_default=func.now())
    updated_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class CustomerTotal(Derived):
    """What a customer has ordered so far. A customer without orders has no row."""

    __tablename__ = "customer_totals"

    customer_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    orders: Mapped[int] = mapped_column(Integer)
    amount: Mapped[Decimal] = mapped_column(Numeric(14, 2))


class OrderStatusLog(Derived):
    """One row for each status that an order has had."""

    __tablename__ = "order_status_log"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    order_id: Mapped[int] = mapped_column(BigInteger, index=True)
    old_status: Mapped[str | None] = mapped_column(Text)
    new_status: Mapped[str] = mapped_column(Text)
    changed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
