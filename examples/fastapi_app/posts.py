"""Posts, found by words and read page by page."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, HTTPException, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, delete, func, select, update

from examples.fastapi_app.services import Me, Own
from examples.fastapi_app.tables import Post

posts = APIRouter(prefix="/posts", tags=["posts"])

Title = Annotated[str, Field(min_length=1, max_length=200)]
Body = Annotated[str, Field(max_length=20_000)]


class PostIn(BaseModel):
    """A post to be."""

    title: Title
    body: Body = ""
    published: bool = False


class PostChange(BaseModel):
    """What is to be another; the rest stays."""

    title: Title | None = None
    body: Body | None = None
    published: bool | None = None


class PostOut(BaseModel):
    """A post."""

    model_config = ConfigDict(from_attributes=True)

    id: int
    author_id: UUID
    title: str
    body: str
    published: bool
    created_at: datetime
    updated_at: datetime


class Page(BaseModel):
    """Some posts, newest first."""

    posts: list[PostOut]
    next: int | None
    """Ask again with `before=` this; null on the last page."""


@posts.post("", status_code=201, response_model=PostOut)
async def create(given: PostIn, me: Me, session: Own) -> Post:
    """Write one, as the caller."""
    post = Post(author_id=me, **given.model_dump())
    session.add(post)
    await session.flush()
    await session.refresh(post)
    return post


@posts.get("")
async def find(
    session: Own,
    q: Annotated[str, Query(max_length=200)] = "",
    author: UUID | None = None,
    before: int | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page:
    """List what the caller may see, by words (`"a phrase"`, `-without`) and by author."""
    found = await _page(session, _wanted(q, author), before, limit)
    shown = [PostOut.model_validate(post) for post in found[:limit]]
    return Page(posts=shown, next=shown[-1].id if len(found) > limit else None)


def _wanted(q: str, author: UUID | None) -> Select[Post]:
    wanted = select(Post)
    if q:
        words = func.to_tsvector("simple", Post.title + " " + Post.body)
        wanted = wanted.where(words.bool_op("@@")(func.websearch_to_tsquery("simple", q)))
    return wanted if author is None else wanted.where(Post.author_id == author)


async def _page(session: Own, wanted: Select[Post], before: int | None, limit: int) -> Sequence[Post]:
    if before is not None:
        wanted = wanted.where(Post.id < before)
    # One more than is shown tells whether there is another page. By key: an offset would skip and repeat.
    return (await session.scalars(wanted.order_by(Post.id.desc()).limit(limit + 1))).all()


@posts.get("/{number}", response_model=PostOut)
async def read(number: int, session: Own) -> Post:
    """Show one; what the caller may not see is not there."""
    post = await session.get(Post, number)
    if post is None:
        raise HTTPException(404, "there is no such post")
    return post


@posts.patch("/{number}", response_model=PostOut)
async def change(number: int, given: PostChange, session: Own) -> Post:
    """Change one of the caller's."""
    values = given.model_dump(exclude_none=True)
    if not values:
        raise HTTPException(422, "say what is to change: title, body or published")
    # An update in one statement: what is read first may be another a moment later.
    changed = update(Post).where(Post.id == number).values(**values).returning(Post)
    post = (await session.scalars(changed)).one_or_none()
    if post is None:
        raise HTTPException(404, "there is no such post of yours")
    return post


@posts.delete("/{number}", status_code=204)
async def remove(number: int, session: Own) -> Response:
    """Delete one of the caller's."""
    gone = await session.execute(delete(Post).where(Post.id == number).returning(Post.id))
    if gone.one_or_none() is None:
        raise HTTPException(404, "there is no such post of yours")
    return Response(status_code=204)
