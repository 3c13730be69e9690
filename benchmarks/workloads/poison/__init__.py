"""What the benchmark of failing changes lets the daemon do: copy orders, and fail at those that are poison.

Each module is served alone, as HANDLERS. A row in `derived_mended` mends all of them, so that the same
backlog is the clean run too.
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

POISON: Final = "poison"

# `seq` tells in which order they were applied; that an order is copied once only is checked at the end, for a
# unique constraint would make a second copy a failure of its own.
TABLES: Final = """
create table public.derived_copies (
  seq         bigint generated always as identity primary key,
  order_id    bigint not null,
  customer_id bigint not null,
  again       boolean not null
);
create table public.derived_mended (since timestamptz not null default now());
"""

_COPY: Final = text(
    "insert into derived_copies (order_id, customer_id, again)"
    " select * from unnest(cast(:ids as bigint[]), cast(:customers as bigint[]), cast(:again as boolean[]))"
)
_MENDED: Final = text("select exists (select from derived_mended)")

Order = tuple[int, int, str, bool]
"""Its id, customer and status, and whether it was redriven."""


class PoisonError(Exception):
    """An order cannot be copied until the handler is mended."""


async def is_mended(session: AsyncSession) -> bool:
    """Tell whether the handler is mended."""
    return bool((await session.execute(_MENDED)).scalar_one())


def judge(order: Order, *, mended: bool) -> Order:
    """Look at an order before it is copied.

    Raises:
        PoisonError: it is poison, and the handler is not mended.
    """
    if order[2] == POISON and not mended:
        raise PoisonError("an order is poison")
    return order


async def look_at(order: Order, session: AsyncSession) -> Order:
    """Do so, and ask only then whether the handler is mended."""
    return judge(order, mended=order[2] != POISON or await is_mended(session))


async def copy(session: AsyncSession, orders: Sequence[Order]) -> None:
    """Copy orders."""
    if not orders:
        return
    ids, customers, _, again = (list(column) for column in zip(*orders, strict=True))
    await session.execute(_COPY, {"ids": ids, "customers": customers, "again": again})
