"""The lent session: what a handler may do with it, and what the worker's own can still do afterwards."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import Integer, Text, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from standin.embedded import EmbeddedPostgres
from worker.errors import SessionMisuse
from worker.sessions import handler_session


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    body: Mapped[str] = mapped_column(Text)


@pytest.fixture(scope="module")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AsyncEngine]:
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        engine = create_async_engine(postgres.dsn().replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield engine
        await engine.dispose()


@pytest.fixture
async def session(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    async with engine.begin() as connection:
        await connection.execute(text("truncate note"))
    async with AsyncSession(engine) as session:
        await session.begin()
        yield session


async def stored(engine: AsyncEngine) -> dict[int, str]:
    async with engine.connect() as connection:
        rows = await connection.execute(text("select id, body from note order by id"))
        return {row.id: row.body for row in rows}


async def enter(session: AsyncSession) -> None:
    async with session:
        pass


async def enter_begin(session: AsyncSession) -> None:
    async with session.begin():
        pass


async def commit_root(session: AsyncSession) -> None:
    root = session.get_transaction()
    assert root is not None
    await root.commit()


def sync(misuse: Callable[[Session], Any]) -> Callable[[AsyncSession], Awaitable[Any]]:
    return lambda session: session.run_sync(misuse)


def enter_sync(session: Session) -> None:
    with session:
        pass


MISUSES: dict[str, Callable[[AsyncSession], Awaitable[Any]]] = {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "aclose": lambda session: session.aclose(),
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
    "begin": enter_begin,
    "async with": enter,
    "commit of the root transaction": commit_root,
    "sync commit": sync(lambda session: session.commit()),
    "sync rollback": sync(lambda session: session.rollback()),
    "sync close": sync(lambda session: session.close()),
    "sync begin": sync(lambda session: session.begin()),
    "sync with": sync(enter_sync),
    "sync prepare": sync(lambda session: session.prepare()),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES.keys())
async def test_what_would_end_the_transaction_is_refused_and_harms_nothing(
    misuse: Callable[[AsyncSession], Awaitable[Any]], session: AsyncSession, engine: AsyncEngine
) -> None:
    lent = handler_session(session)
    lent.add(Note(id=1, body="before"))
    await lent.flush()

    with pytest.raises(SessionMisuse, match="is refused: the worker commits"):
        await misuse(lent)

    assert await stored(engine) == {}
    lent.add(Note(id=2, body="after"))
    await session.commit()
    assert await stored(engine) == {1: "before", 2: "after"}


async def test_the_message_tells_what_to_do_instead(session: AsyncSession) -> None:
    with pytest.raises(SessionMisuse) as refused:
        await handler_session(session).commit()
    assert str(refused.value).startswith("commit() of a handler's session is refused")
    assert "begin_nested()" in str(refused.value)


async def test_a_savepoint_commits_and_rolls_back_on_its_own(
    session: AsyncSession, engine: AsyncEngine
) -> None:
    lent = handler_session(session)
    async with lent.begin_nested():
        lent.add(Note(id=1, body="kept"))
    async with lent.begin_nested() as savepoint:
        lent.add(Note(id=2, body="undone"))
        await lent.flush()
        await savepoint.rollback()
    with contextlib.suppress(ZeroDivisionError):
        async with lent.begin_nested():
            lent.add(Note(id=3, body="undone by the exception"))
            raise ZeroDivisionError
    savepoint = await lent.begin_nested()
    lent.add(Note(id=4, body="kept as well"))
    await savepoint.commit()
    await session.commit()
    assert await stored(engine) == {1: "kept", 4: "kept as well"}


async def test_a_failed_statement_in_a_savepoint_leaves_the_transaction_usable(
    session: AsyncSession, engine: AsyncEngine
) -> None:
    lent = handler_session(session)
    lent.add(Note(id=1, body="first"))
    await lent.flush()
    with pytest.raises(IntegrityError):
        async with lent.begin_nested():
            await lent.execute(text("insert into note values (1, 'again')"))
    lent.add(Note(id=2, body="second"))
    await session.commit()
    assert await stored(engine) == {1: "first", 2: "second"}


async def test_savepoints_of_worker_and_handler_nest(session: AsyncSession, engine: AsyncEngine) -> None:
    outer = await session.begin_nested()
    lent = handler_session(session)
    async with lent.begin_nested():
        lent.add(Note(id=1, body="undone with the worker's savepoint"))
    await outer.rollback()
    lent = handler_session(session)
    lent.add(Note(id=2, body="kept"))
    await session.commit()
    assert await stored(engine) == {2: "kept"}


async def test_a_transaction_that_the_handler_opens_is_the_workers(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("truncate note"))
    async with AsyncSession(engine) as session:
        async with handler_session(session).begin_nested():
            handler_session(session).add(Note(id=1, body="in the first savepoint"))
        assert session.in_transaction()
        await session.rollback()
        assert not session.in_transaction()
        handler_session(session).add(Note(id=2, body="later"))
        await session.commit()
    assert await stored(engine) == {2: "later"}


async def test_both_see_the_same_objects(session: AsyncSession) -> None:
    lent = handler_session(session)
    note = Note(id=1, body="one")
    lent.add(note)
    assert note in session
    assert note in session.new
    await session.flush()
    assert await lent.get(Note, 1) is note
    assert await session.scalar(text("select pg_backend_pid()")) == await lent.scalar(
        text("select pg_backend_pid()")
    )
    with lent.no_autoflush:
        assert not session.autoflush
    assert session.autoflush


async def test_the_workers_own_session_is_never_guarded(session: AsyncSession, engine: AsyncEngine) -> None:
    lent = handler_session(session)
    with pytest.raises(SessionMisuse):
        await lent.rollback()
    session.add(Note(id=1, body="one"))
    await session.commit()
    await session.begin()
    await session.rollback()
    await session.close()
    assert await stored(engine) == {1: "one"}
    with pytest.raises(SessionMisuse):
        await lent.commit()


async def test_a_flush_that_fails_without_savepoint_is_seen_by_the_worker(
    session: AsyncSession, engine: AsyncEngine
) -> None:
    lent = handler_session(session)
    savepoint = await session.begin_nested()
    await lent.execute(text("insert into note values (1, 'there')"))
    lent.add(Note(id=1, body="again"))
    with pytest.raises(IntegrityError):
        await lent.flush()
    await savepoint.rollback()
    session.add(Note(id=2, body="the worker goes on"))
    await session.commit()
    assert await stored(engine) == {2: "the worker goes on"}
