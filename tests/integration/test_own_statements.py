"""What goes by the driver: statements of our own in the transaction of a session, and that of a pass."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.stack import Servers
from worker.database import is_away, make_engine
from worker.driver import DrivenSession, run, transaction


class Base(DeclarativeBase):
    """Of the table below."""


class Row(Base):
    """A row."""

    __tablename__ = "own_statements"
    n: Mapped[int] = mapped_column(primary_key=True)


COUNT = "select count(*) from own_statements"


@pytest.fixture
async def engine(shared: Servers) -> AsyncIterator[AsyncEngine]:
    engine = make_engine(shared.postgres.dsn(), name="own statements", size=2)
    async with engine.begin() as connection:
        await connection.execute(text("create table own_statements (n integer)"))
    yield engine
    async with engine.begin() as connection:
        await connection.execute(text("drop table own_statements"))
    await engine.dispose()


async def count(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text(COUNT))).scalar_one())


async def test_the_first_statement_of_a_session_is_in_its_transaction(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session:
        await run(session, "insert into own_statements values ($1)", 1)
        assert (await run(session, COUNT))[0][0] == 1
        assert await count(engine) == 0
        await session.execute(text("insert into own_statements values (2)"))
        assert (await run(session, COUNT))[0][0] == 2
        await session.rollback()
        assert await count(engine) == 0
        await run(session, "insert into own_statements values ($1)", 3)
        await session.commit()
    assert await count(engine) == 1


async def test_a_savepoint_undoes_it(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as session, session.begin():
        await run(session, "insert into own_statements values ($1)", 1)
        savepoint = await session.begin_nested()
        await run(session, "insert into own_statements values ($1)", 2)
        with pytest.raises(asyncpg.DivisionByZeroError):
            await run(session, "select 1 / $1::integer", 0)
        await savepoint.rollback()
        assert (await run(session, COUNT))[0][0] == 1


async def _kill(engine: AsyncEngine, pids: list[int]) -> None:
    # The killer is no connection of the pool: those die while nobody looks.
    killer = await asyncpg.connect(
        engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    )
    try:
        await killer.fetch("select pg_terminate_backend(pid, 5000) from unnest($1::integer[]) pid", pids)
    finally:
        await killer.close()


async def _kill_all(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        pids = [(await run(one, "select pg_backend_pid()"))[0][0] for one in (first, second)]
    await _kill(engine, pids)


async def test_one_that_finds_the_server_gone_puts_the_whole_pool_in_doubt(engine: AsyncEngine) -> None:
    await _kill_all(engine)
    async with AsyncSession(engine) as session:
        with pytest.raises((DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
            await run(session, "select 1")
        assert is_away(caught.value)
    async with AsyncSession(engine) as one, AsyncSession(engine) as another:
        assert (await run(one, "select 1"))[0][0] == (await run(another, "select 1"))[0][0] == 1


# The transaction of a pass

INSERT = "insert into own_statements values ($1)"


async def idle(engine: AsyncEngine) -> bool:
    """Tell whether every connection of the engine is back, and in no transaction."""
    async with engine.connect() as one, engine.connect() as another:
        for connection in (one, another):
            pooled = await connection.get_raw_connection()
            if pooled.driver_connection.is_in_transaction():  # type: ignore[union-attr] # asyncpg's own
                return False
    return True


@pytest.mark.parametrize("by", ["driver", "session", "both"])
async def test_a_pass_is_committed_as_a_whole(engine: AsyncEngine, by: str) -> None:
    async with transaction(engine) as session:
        if by != "session":
            await run(session, INSERT, 1)
        if by != "driver":
            await session.execute(text("insert into own_statements values (2)"))
        assert await count(engine) == 0
    assert await count(engine) == (2 if by == "both" else 1)
    assert await idle(engine)


@pytest.mark.parametrize("by", ["driver", "session", "both"])
async def test_a_pass_is_rolled_back_as_a_whole(engine: AsyncEngine, by: str) -> None:
    async def work() -> None:
        async with transaction(engine) as session:
            if by != "session":
                await run(session, INSERT, 1)
            if by != "driver":
                await session.execute(text("insert into own_statements values (2)"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    assert await count(engine) == 0
    assert await idle(engine)


async def test_what_nobody_has_flushed_is_part_of_it(engine: AsyncEngine) -> None:
    async with transaction(engine) as session:
        session.add(Row(n=7))
    assert await count(engine) == 1


async def test_a_cancelled_pass_leaves_nothing_behind(engine: AsyncEngine) -> None:
    inside = asyncio.Event()

    async def work() -> None:
        async with transaction(engine) as session:
            await run(session, INSERT, 1)
            inside.set()
            await run(session, "select pg_sleep(60)")

    task = asyncio.create_task(work())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await count(engine) == 0
    assert await idle(engine)


@pytest.mark.parametrize("how", ["BEGIN", "COMMIT", "ROLLBACK"])
async def test_a_pass_cancelled_at_its_begin_or_end_spoils_no_connection(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A connection that is left within a transaction would take the next one for a part of it."""
    execute = asyncpg.Connection.execute

    async def cancelled(connection: asyncpg.Connection, query: str, *rest: object, **named: object) -> str:
        if query.startswith(how):
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # as soon as the statement is under way
        return str(await execute(connection, query, *rest, **named))

    async def work() -> None:
        async with transaction(engine) as session:
            await run(session, INSERT, 1)
            if how == "ROLLBACK":
                raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(asyncpg.Connection, "execute", cancelled)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(work())
    assert await idle(engine)
    before = await count(engine)
    async with transaction(engine) as one, transaction(engine) as another:
        await run(one, INSERT, 2)
        await run(another, INSERT, 3)
    assert await count(engine) == before + 2


@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
async def test_a_session_that_is_given_up_loses_all(engine: AsyncEngine, *, used: bool) -> None:
    given_up: list[DrivenSession] = []

    async def work() -> None:
        async with transaction(engine) as session:
            given_up.append(session)
            await run(session, INSERT, 1)
            if used:
                await session.execute(text(COUNT))
            await session.invalidate()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await work()
    with pytest.raises(SQLAlchemyError):
        await given_up[0].execute(text("insert into own_statements values (3)"))
    assert await count(engine) == 0
    assert await idle(engine)


async def test_a_pass_that_finds_the_server_gone_puts_the_whole_pool_in_doubt(engine: AsyncEngine) -> None:
    await _kill_all(engine)
    with pytest.raises((DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
        async with transaction(engine):
            pass
    assert is_away(caught.value)
    async with transaction(engine) as one, transaction(engine) as another:
        assert (await run(one, "select 1"))[0][0] == (await run(another, "select 1"))[0][0] == 1


async def test_a_server_that_goes_before_the_commit_is_away(engine: AsyncEngine) -> None:
    async def work() -> None:
        async with transaction(engine) as session:
            await run(session, INSERT, 1)
            pid = (await run(session, "select pg_backend_pid()"))[0][0]
            await _kill(engine, [pid])

    with pytest.raises((DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
        await work()
    assert is_away(caught.value)
    assert await count(engine) == 0


async def test_built_in_types_are_asked_for_once_in_a_process(engine: AsyncEngine) -> None:
    asked = (
        "select count(*) from pg_prepared_statements"
        " where statement like '%typeinfo_tree%' and statement not like '%pg_prepared_statements%'"
    )
    given = text("select cast(:ranges as int8range[]) = cast(:ranges as int8range[])")
    found = []
    async with engine.connect() as first, engine.connect() as second:
        for connection in (first, second):
            assert (await connection.execute(given, {"ranges": [asyncpg.Range(1, 2)]})).scalar_one()
            found.append((await connection.execute(text(asked))).scalar_one())
    assert found == [1, 0]
