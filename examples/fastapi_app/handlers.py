"""What the worker does for this API: it keeps figures of each author.

Named to it by `HANDLERS=examples.fastapi_app.handlers`.
"""

from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from worker import Handlers

on = Handlers()

STATS = text(
    "insert into derived_author_stats (author_id, posts, published, words, latest_at)"
    " select a, count(p.id), count(p.id) filter (where p.published),"
    "  coalesce(sum(cardinality(regexp_split_to_array(trim(p.body), '\\s+')))"
    "   filter (where trim(p.body) <> ''), 0),"
    "  max(p.created_at)"
    " from unnest(cast(:authors as uuid[])) a left join posts p on p.author_id = a group by a"
    " on conflict (author_id) do update set posts = excluded.posts, published = excluded.published,"
    " words = excluded.words, latest_at = excluded.latest_at"
)
TELL = text("select pg_notify('author_stats', cast(a as text)) from unnest(cast(:authors as uuid[])) a")


@on.derive("public.posts", by="author_id")
async def author_stats(authors: list[UUID], session: AsyncSession) -> None:
    """Count each author's posts and words anew.

    Postgres tells those who listen when the transaction has committed, and not at all if it never does.
    """
    await session.execute(STATS, {"authors": authors})
    await session.execute(TELL, {"authors": authors})
