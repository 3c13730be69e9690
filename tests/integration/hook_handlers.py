"""Notes what it is given."""

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Change, Handlers

on = Handlers()


@on.change("public.items")
async def note(change: Change, session: AsyncSession) -> None:
    values = {"id": change.key[0], "note": change.record["note"] if change.record else "-"}
    await session.execute(text("insert into derived_notes (id, note) values (:id, :note)"), values)
