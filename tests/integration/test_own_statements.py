"""Statements of our own, which go by the driver, in the transaction of a session."""

from collections.abc import AsyncIterator

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from tests.stack import Servers
from worker.database import is_away, make_engine, run

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


async def test_one_that_finds_the_server_gone_puts_the_whole_pool_in_doubt(engine: AsyncEngine) -> None:
    async with AsyncSession(engine) as first, AsyncSession(engine) as second:
        pids = [(await run(one, "select pg_backend_pid()"))[0][0] for one in (first, second)]
        await first.rollback()
        await second.rollback()
        await first.close()
        await second.close()
    # The killer is no connection of the pool: both of it die while nobody looks.
    killer = await asyncpg.connect(
        engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    )
    try:
        await killer.fetch("select pg_terminate_backend(pid, 5000) from unnest($1::integer[]) pid", pids)
    finally:
        await killer.close()
    async with AsyncSession(engine) as session:
        with pytest.raises((DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)) as caught:
            await run(session, "select 1")
        assert is_away(caught.value)
    async with AsyncSession(engine) as one, AsyncSession(engine) as another:
        assert (await run(one, "select 1"))[0][0] == (await run(another, "select 1"))[0][0] == 1
