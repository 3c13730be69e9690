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

# Made once, not for each call; one array, not a list of parameters, so that a batch of any size has the same.
_CUSTOMERS = any_(bindparam("customer_ids", type_=ARRAY(BigInteger)))
_ADDED_UP = (
    select(Order.customer_id, func.count(), func.sum(Order.amount))
    .where(Order.customer_id == _CUSTOMERS)
    .group_by(Order.customer_id)
)
_INSERT = insert(CustomerTotal).from_select(["customer_id", "orders", "amount"], _ADDED_UP)
_UPSERT = _INSERT.on_conflict_do_update(
    index_elements=[CustomerTotal.customer_id],
    set_={"orders": _INSERT.excluded.orders, "amount": _INSERT.excluded.amount},
).execution_options(dml_strategy="raw")  # the parameters are no rows to be inserted
# Who has no order left is not among the totals.
_DELETE = (
    delete(CustomerTotal)
    .where(CustomerTotal.customer_id == _CUSTOMERS)
    .where(~exists().where(Order.customer_id == CustomerTotal.customer_id))
    .execution_options(synchronize_session=False)
)


@on.derive("public.orders", by="customer_id", all_keys=select(CustomerTotal.customer_id))
async def customer_totals(customer_ids: list[int], session: AsyncSession) -> None:
    """Compute the totals of these customers anew."""
    await session.execute(_UPSERT, {"customer_ids": customer_ids})
    await session.execute(_DELETE, {"customer_ids": customer_ids})
