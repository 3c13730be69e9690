"""A handler with `role=` runs under row-level security; the worker beside it does not."""

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from standin.embedded import bootstrap_supabase
from tests.stack import Servers, execute
from worker import Handlers
from worker.sessions import acting_as

ANN = "11111111-1111-1111-1111-111111111111"


async def test_role_and_claims_hold_for_the_call_and_no_longer(shared: Servers) -> None:
    url = shared.postgres.dsn()
    await execute(url, "create database roles")
    url = shared.postgres.dsn("roles")
    await bootstrap_supabase(url)
    await execute(
        url,
        "create table notes (id int primary key, owner uuid); alter table notes enable row level security;"
        " create policy own on notes using (owner = auth.uid());"
        f" insert into notes values (1, '{ANN}'), (2, gen_random_uuid());",
    )
    on = Handlers()

    @on.insert("notes", role="authenticated", claims={"sub": ANN})
    async def handler(change: object, session: AsyncSession) -> None: ...

    (declared,) = on.handlers()
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=1)
    who = text("select current_user, count(*), current_setting('request.jwt.claims', true) from notes")
    try:
        async with AsyncSession(engine) as session, session.begin():
            async with acting_as(session, declared):
                user, seen, claims = (await session.execute(who)).one()
                assert (user, seen) == ("authenticated", 1)
                assert ANN in claims
            assert tuple((await session.execute(who)).one()) == ("postgres", 2, "")
        async with AsyncSession(engine) as session:
            user, seen, _ = (await session.execute(who)).one()
            assert (user, seen) == ("postgres", 2)
        async with AsyncSession(engine) as session, session.begin():
            with pytest.raises(DBAPIError):
                async with session.begin_nested(), acting_as(session, declared):
                    await session.execute(text("insert into notes values (3, gen_random_uuid())"))
            user, seen, _ = (await session.execute(who)).one()
            assert (user, seen) == ("postgres", 2)
    finally:
        await engine.dispose()
