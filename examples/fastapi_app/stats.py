"""What the worker has derived: read, and streamed as it changes."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from examples.fastapi_app.feed import Watcher
from examples.fastapi_app.services import Caller, Here, Own, Services
from examples.fastapi_app.tables import AuthorStats
from worker.sessions import session_as
from worker.tokens import Identity

stats = APIRouter(prefix="/stats", tags=["stats"])

HEARTBEAT_SECONDS = 15.0
"""Proxies end what is silent for long."""


class StatsOut(BaseModel):
    """Figures of an author."""

    model_config = ConfigDict(from_attributes=True)

    author_id: UUID
    posts: int
    published: int
    words: int
    latest_at: datetime | None


@stats.get("/authors", response_model=list[StatsOut])
async def top(session: Own, limit: Annotated[int, Query(ge=1, le=100)] = 10) -> Sequence[AuthorStats]:
    """List the authors with the most published posts."""
    order = (AuthorStats.published.desc(), AuthorStats.author_id)
    return (await session.scalars(select(AuthorStats).order_by(*order).limit(limit))).all()


@stats.get("/authors/{author}", response_model=StatsOut)
async def read(author: UUID, session: Own) -> AuthorStats:
    """Show the figures of one."""
    found = await session.get(AuthorStats, author)
    if found is None:
        raise HTTPException(404, "nothing is known of this author")
    return found


@stats.get("/stream")
async def stream(caller: Caller, here: Here, author: UUID) -> StreamingResponse:
    """Send an author's figures now and after each change, as server-sent events.

    The token is in the header, where browsers' EventSource cannot put it: read the stream with `fetch`. It
    ends when the token does.
    """
    events = _events(here, caller, author)
    return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def _events(here: Services, caller: Identity, author: UUID) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    lasts = loop.time() + max(0.0, float(caller.claims["exp"]) - datetime.now().timestamp())  # noqa: DTZ005 - a moment
    async with here.feed.watching() as watcher:
        while loop.time() < lasts:
            if await _rung(watcher, author):
                # Each time with the caller's rights of now, and without keeping a connection in between.
                async with session_as(here.engine, caller.role, caller.claims) as session:
                    found = await session.get(AuthorStats, author)
                told = None if found is None else StatsOut.model_validate(found).model_dump(mode="json")
                yield f"event: stats\ndata: {json.dumps(told)}\n\n"
            else:
                yield ": still here\n\n"


async def _rung(watcher: Watcher, author: UUID) -> bool:
    """Wait for news of the author; False when none came for a while."""
    try:
        async with asyncio.timeout(HEARTBEAT_SECONDS):
            while True:
                keys = await watcher.changed()
                if None in keys or str(author) in keys:
                    return True
    except TimeoutError:
        return False
