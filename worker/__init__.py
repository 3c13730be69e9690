"""Tailrace: what handlers are written with.

from worker import Change, Handlers

on = Handlers()

@on.derive("public.orders", by="customer_id")
async def customer_totals(customer_ids: list[int], session: AsyncSession) -> None: ...
"""

from worker.change import Change, Context
from worker.errors import GiveUp, RetryLater
from worker.letters import DeadLetter
from worker.registry import Handlers

__all__ = ["Change", "Context", "DeadLetter", "GiveUp", "Handlers", "RetryLater"]
