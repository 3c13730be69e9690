"""The figures of an author follow what the author writes."""

from collections.abc import Awaitable, Callable
from uuid import uuid4

from examples.fastapi_app.tables import AuthorStats, Post, Profile
from worker.testing import Deliver, Pipeline, delete, factory, insert, update

make_profile = factory(Profile, name="Ada")
make_post = factory(Post)


async def test_posts_and_words_are_counted(deliver: Deliver) -> None:
    """New posts, changed ones, and those that are deleted."""
    ada = make_profile(id=uuid4())
    deliver.session.add(ada)
    await deliver.session.flush()
    first, second = make_post(author_id=ada.id, body="a b c"), make_post(author_id=ada.id)

    await deliver(insert(first), insert(second))
    stats = await deliver.session.get_one(AuthorStats, ada.id)
    assert (stats.posts, stats.published, stats.words) == (2, 0, 3)

    await deliver(update(first, body="a b", published=True), delete(second))
    stats = await deliver.session.get_one(AuthorStats, ada.id)
    assert (stats.posts, stats.published, stats.words) == (1, 1, 2)


async def test_a_post_that_changes_hands_counts_for_both(
    pipeline: Pipeline, settle: Callable[[], Awaitable[None]]
) -> None:
    """Through the whole pipeline: old values come with the log."""
    ada, eva = make_profile(id=uuid4()), make_profile(id=uuid4())
    post = make_post(author_id=ada.id)
    await pipeline.write(insert(ada), insert(eva), insert(post))
    await settle()
    await pipeline.write(update(post, author_id=eva.id))
    await settle()
    async with pipeline.session() as session:
        posts = {person: (await session.get_one(AuthorStats, person)).posts for person in (ada.id, eva.id)}
    assert posts == {ada.id: 0, eva.id: 1}
