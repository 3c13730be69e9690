"""A derive handler: keeps the totals of each customer.

It is given the customers whose orders changed, each once per batch, and computes their totals from the
orders as they are now. So it is right whatever happened in between: start with this kind of handler.
"""

from sqlalchemy import BigInteger, any_, bindparam, delete, exists, func, select
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.ext.asyncio import AsyncSession

from handlers.tables import CustomerTotal, Order
from worker import Handlers

on = Handlers()


@on.derive("public.orders", by="customer_id", all_keys=select(CustomerTotal.customer_id))
async def customer_totals(customer_ids: list[int], session: AsyncSession) -> None:
    """Compute the totals of these customers anew."""
    # One array, not a list of parameters: the statement is the same for a batch of any size.
    customers = any_(bindparam("customer_ids", customer_ids, ARRAY(BigInteger)))

    totals = (
        select(Order.customer_id, func.count(), func.sum(Order.amount))
        .where(Order.customer_id == customers)
        .group_by(Order.customer_id)
    )
    upsert = insert(CustomerTotal).from_select(["customer_id", "orders", "amount"], totals)
    await session.execute(
        upsert.on_conflict_do_update(
            index_elements=[CustomerTotal.customer_id],
            set_={"orders": upsert.excluded.orders, "amount": upsert.excluded.amount},
        )
    )

    # Who has no order left is not among the totals.
    has_orders = exists().where(Order.customer_id == CustomerTotal.customer_id)
    await session.execute(
        delete(CustomerTotal)
        .where(CustomerTotal.customer_id == customers, ~has_orders)
        .execution_options(synchronize_session=False)
    )
