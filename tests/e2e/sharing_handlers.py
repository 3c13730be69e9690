"""Handlers for tests of many workers: each call takes its time, so that lanes have something to share."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

on = Handlers()


@on.change("public.orders", name="slow", batch=500)
async def slow(changes: list[Change], session: AsyncSession) -> None:
    await session.execute(text("select pg_sleep(0.03)"))
