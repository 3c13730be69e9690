"""A handler with `role=` runs under row-level security; the worker beside it does not."""

import asyncio
import shutil
from collections.abc import Mapping

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from standin.embedded import bootstrap_supabase
from tests.integration.mechanism.bench import Bench, item
from tests.integration.wal.pooler import pooled
from tests.stack import Servers, execute, project
from worker import Change, Handlers
from worker.database import make_engine
from worker.sessions import acting_as, session_as

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


async def test_what_a_policy_forbids_is_the_handlers_failure_and_others_go_on(at: Bench) -> None:
    await at.db.execute(
        "alter table derived_log enable row level security; grant usage on schema public to authenticated;"
        " grant all on derived_log, derived_log_n_seq to authenticated;"
        " create policy own on derived_log to authenticated with check (note <> 'forbidden')"
    )
    on = Handlers()

    @on.insert("items", name="as_a_user", lane_key="grp", role="authenticated", claims={"sub": ANN})
    async def write(change: Change, session: AsyncSession) -> None:
        assert change.record is not None
        insert = text("insert into derived_log (handler, id, note) values (current_user, :id, :note)")
        await session.execute(insert, change.record)

    await at.load(on)
    for id_, note in ((1, "good"), (2, "forbidden"), (3, "good")):
        await at.put("items", item(id_, id_, note))
    await at.settle(at.drain("as_a_user", max_attempts=2))
    assert sorted(await at.log("handler || id")) == ["authenticated1", "authenticated3"]
    ((status, error_class, hint),) = await at.rows("held", "status, error_class, hint")
    assert (status, error_class) == ("dead", "sqlalchemy.exc.ProgrammingError")
    assert "grant what it lacks" in hint
    assert await at.counters() == (2, 1, 0)


async def test_nothing_leaks_through_a_transaction_pooler(shared: Servers) -> None:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    tables = (
        "create table notes (owner text, n int); alter table notes enable row level security;"
        " create policy own on notes using (owner = auth.jwt() ->> 'sub');"
        " insert into notes select 'user' || u, n from generate_series(1, 8) u, generate_series(1, 3) n"
    )
    who = text(
        "select current_user, coalesce(current_setting('request.jwt.claims', true), ''),"
        " (select string_agg(distinct owner, ',') from notes), pg_backend_pid()"
    )
    backends = set()
    # One connection to the server, which everybody is lent in turn.
    async with project(shared, tables, "handlers") as made, pooled(made.database_url, size=1) as url:
        engines = [make_engine(url, name="test", size=4) for _ in range(2)]

        async def as_user(number: int) -> None:
            claims: Mapping[str, str] = {"sub": f"user{number}"}
            for _ in range(10):
                async with session_as(engines[number % 2], "authenticated", claims) as session:
                    user, told, seen, backend = (await session.execute(who)).one()
                assert (user, seen) == ("authenticated", f"user{number}")
                assert f"user{number}" in told
                backends.add(backend)

        async def as_nobody() -> None:
            for _ in range(20):
                async with engines[0].connect() as connection:
                    user, told, seen, backend = (await connection.execute(who)).one()
                assert (user, told, len(seen.split(","))) == ("postgres", "", 8)
                backends.add(backend)

        async with asyncio.TaskGroup() as group:
            for number in range(1, 9):
                group.create_task(as_user(number))
            group.create_task(as_nobody())
        for engine in engines:
            await engine.dispose()
    assert len(backends) == 1
