"""A derive handler: copies the orders whose ids it is given."""

from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.workloads import DERIVE
from worker import Handlers

on = Handlers()
_STATEMENT: Final = text(DERIVE.format(ids=":ids"))


@on.derive("public.orders", by="id", name="derive")
async def copy(ids: list[int], session: AsyncSession) -> None:
    await session.execute(_STATEMENT, {"ids": ids})
