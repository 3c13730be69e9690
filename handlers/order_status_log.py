"""A change handler: writes down every status that an order has had.

It is given each change once, in the order of the commits. There is no unique key to guard against a second
time: the row is committed together with the position of the change.
"""

from sqlalchemy.ext.asyncio import AsyncSession

from handlers.tables import Order, OrderStatusLog
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders")
@on.update("public.orders", columns=["status"])
async def order_status_log(change: Change[Order], session: AsyncSession) -> None:
    """Add the new status, and the one before it."""
    order, before = change.as_(), change.old_as()
    session.add(
        OrderStatusLog(
            order_id=order.id,
            old_status=before.status if before else None,
            new_status=order.status,
            changed_at=change.commit_timestamp,
        )
    )
