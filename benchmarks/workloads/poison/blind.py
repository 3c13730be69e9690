"""A change handler that is given lists, and whose error does not tell which of them it is about."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads.poison import POISON, copy, look_at
from worker import Change, Handlers

on = Handlers()


@on.insert("public.orders", lane_key="customer_id", batch=500, name="blind")
async def blind(changes: list[Change], session: AsyncSession) -> None:
    rows: list[tuple[dict[str, Any], bool]] = [
        (change.record or {}, change.source == "redrive") for change in changes
    ]
    await copy(session, [(row["id"], row["customer_id"], row["status"], again) for row, again in rows])
    if any(row["status"] == POISON for row, _ in rows):  # as a statement fails for one of its rows
        await look_at((0, 0, POISON, False), session)
