"""What type checkers must refuse of typed rows, mypy and pyright alike. Never run."""
# pyright: reportUnnecessaryTypeIgnoreComment=true, reportUnknownVariableType=false, reportUnknownMemberType=false

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from worker import Change


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Customer(Base):
    __tablename__ = "customers"
    id: Mapped[int] = mapped_column(primary_key=True)


async def rows_are_of_their_model(change: Change[Order]) -> None:
    unknown = change.as_().amount  # type: ignore[attr-defined]
    other: Customer = change.as_()  # type: ignore[assignment]
    perhaps: Order = change.old_as()  # type: ignore[assignment]
    gone: Order = await change.row()  # type: ignore[assignment]
    await of_customers(change)  # type: ignore[arg-type]
    del unknown, other, perhaps, gone


async def of_customers(change: Change[Customer]) -> None: ...
