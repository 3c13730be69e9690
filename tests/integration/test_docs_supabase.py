"""Every example of docs/supabase.md, run."""

import ast
import re
import sys
import types
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from config.settings import Settings
from tests.kit.projects import run_pytest
from tests.pages import blocks
from tests.stack import ROOT, SECRET, Servers, project
from worker import Change, Context
from worker.change import Position, Record
from worker.database import make_engine
from worker.draining.calls import Caller
from worker.errors import SessionMisuse
from worker.sessions import session_as
from worker.supabase import SupabaseClients
from worker.tokens import Identity
from worker.web import serve

PAGE = (ROOT / "docs/supabase.md").read_text()


def example(heading: str, number: int = 0) -> str:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return str(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[number])


def test_no_example_is_left_out() -> None:
    shown = [block.section for block in blocks("python", page="docs/supabase.md")]
    run = re.findall(r"\bexample\(\"(.+?)\"", Path(__file__).read_text())
    assert sorted(shown) == sorted(run)


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    made = types.ModuleType("shown_by_docs_supabase")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def run(text: str, module: types.ModuleType) -> dict[str, Any]:
    exec(compile(ast.parse(text), "docs/supabase.md", "exec"), module.__dict__)  # noqa: S102 - our own page
    return module.__dict__


async def test_tokens(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="requirements.lock has changed: make setup")
    monkeypatch.setenv("SUPABASE_URL", "https://abc.supabase.co")
    monkeypatch.setenv("SUPABASE_JWT_SECRET", SECRET)
    app = run(example("Tokens"), module)["app"]
    claims = {"iss": "https://abc.supabase.co/auth/v1", "sub": "u1", "aud": "authenticated", "exp": 4e9}
    good = jwt.encode(claims | {"role": "authenticated"}, SECRET, "HS256")
    async with (
        serve(app, "127.0.0.1", 0) as served,
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
    ):
        answer = await client.get("/me", headers={"Authorization": f"Bearer {good}"})
        refused = await client.get("/me", headers={"Authorization": f"Bearer {good}x"})
    assert answer.json() == {"id": "u1", "role": "authenticated"}
    assert refused.status_code == 401


PROFILES = """
create table profiles (id uuid primary key, name text);
insert into profiles values ('8d1e7b9c-3a52-4c6f-9f10-7f8f6f2f4f11', 'a'),
    ('8d1e7b9c-3a52-4c6f-9f10-7f8f6f2f4f12', 'b');
create or replace function auth.uid() returns uuid language sql stable as
    $$ select nullif(current_setting('request.jwt.claim.sub', true), '')::uuid $$;
grant usage on schema auth to authenticated;
grant select, update on profiles to authenticated;
alter table profiles enable row level security;
create policy own on profiles to authenticated using (id = auth.uid()) with check (name <> 'forbidden');
"""


async def test_row_level_security(module: types.ModuleType, shared: Servers) -> None:
    rename = run(example("Row-level security outside handlers"), module)["rename"]
    user = "8d1e7b9c-3a52-4c6f-9f10-7f8f6f2f4f11"
    identity = Identity(user, "authenticated", None, {"sub": user, "role": "authenticated"})
    async with project(shared, PROFILES, "handlers") as made:
        engine = make_engine(made.database_url, name="test", size=1)
        assert await rename(engine, identity, "c") == 1
        with pytest.raises(DBAPIError, match="row-level security"):
            await rename(engine, identity, "forbidden")
        names = "select string_agg(name, ',' order by id) from profiles"
        assert await made.db.fetchval(names) == "c,b"
        async with session_as(engine, "anon", {}) as session:
            assert await session.scalar(text("select count(*) from profiles")) == 0

        async def commits() -> None:
            async with session_as(engine, identity.role, identity.claims) as session:
                await session.execute(text("update profiles set name = 'd'"))
                await session.commit()

        with pytest.raises(SessionMisuse):
            await commits()
        assert await made.db.fetchval(names) == "c,b"
        async with engine.connect() as connection:  # the same connection: nothing of it is left
            left = "select current_user, current_setting('request.jwt.claims', true)"
            assert (await connection.execute(text(left))).one()[1] in (None, "")
            assert await connection.scalar(text("select count(*) from profiles")) == 2
        await engine.dispose()


async def test_the_connection(
    module: types.ModuleType, shared: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = run(example("The connection"), module)["answers"]
    monkeypatch.setenv("DATABASE_URL", shared.postgres.dsn())
    assert await answers() == "yes"
    monkeypatch.setenv("DATABASE_URL", shared.postgres.dsn("nothing"))
    assert await answers() == "the database named in DATABASE_URL does not exist"


async def test_rows_behind_changes(module: types.ModuleType, shared: Servers) -> None:
    (handler,) = run(example("Rows behind changes"), module)["on"].handlers()
    tables = """
        create table orders (
            id bigint primary key, customer_id bigint, status text, amount numeric,
            created_at timestamptz, updated_at timestamptz
        );
        insert into orders
        select n, n, case when n = 3 then 'paid' else 'new' end, n from generate_series(1, 3) n
    """
    async with project(shared, tables, "handlers") as made:
        rows = [dict(row) for row in await made.db.fetch("select * from orders order by id")]
        changes = [
            Change(
                position=Position(n, 0),
                schema="public",
                table="orders",
                type="INSERT",
                record=Record(row),
                model=handler.model,
            )
            for n, row in enumerate([*rows, rows[0] | {"id": 99}])
        ]
        engine = make_engine(made.database_url, name="test", size=1)
        caller = Caller(handler, timeout=30, policy=None, context=None)  # type: ignore[arg-type] # not used
        async with AsyncSession(engine) as session, session.begin():
            await caller.changes(session, changes, str)
        await engine.dispose()
        found = await made.db.fetch("select status from orders order by id")
    assert [row["status"] for row in found] == ["shipped", "shipped", "paid"]


CACHING = """
from decimal import Decimal
from pathlib import Path

import pytest
from sqlalchemy import text
from worker.testing import insert, update

TABLES = '''
    create table customers (id bigint primary key, discount numeric not null);
    create table orders (id bigint primary key, customer_id bigint, amount numeric);
    create table prices (order_id bigint, price numeric);
'''


@pytest.fixture(scope="session")
def tailrace_tables():
    return TABLES


@pytest.fixture(scope="session")
def tailrace_handlers():
    return "shown"


PRICES = text("select string_agg(trim_scale(price)::text, ' ' order by order_id) from prices")


async def test_looked_up_once_and_again_after_a_change(deliver):
    await deliver.session.execute(text("insert into customers values (7, 0.1)"))
    assert await deliver(insert("orders", id=1, customer_id=7, amount=10)) == ("shown:price",)
    # Behind its back: nobody hears of it.
    await deliver.session.execute(text("update customers set discount = 0.2"))
    await deliver(insert("orders", id=2, customer_id=7, amount=10))
    assert await deliver(update("customers", 7, discount=Decimal("0.5"))) == ("cache:public.customers",)
    await deliver(insert("orders", id=3, customer_id=7, amount=10))
    assert await deliver.session.scalar(PRICES) == "9 9 5"


async def test_it_ends_through_the_whole_pipeline(pipeline, settle):
    await pipeline.write(insert("customers", id=7, discount=Decimal("0.1")))
    await settle()
    await pipeline.write(insert("orders", id=1, customer_id=7, amount=10))
    await settle()
    await pipeline.write(update("customers", 7, discount=Decimal("0.5")))
    await settle()
    await pipeline.write(insert("orders", id=2, customer_id=7, amount=10))
    await settle()
    async with pipeline.session() as session:
        assert await session.scalar(PRICES) == "9 5"
"""


async def test_a_cache(tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(example("What is looked up again and again"))
    (tmp_path / "test_shown.py").write_text(CACHING)
    code, output = await run_pytest(tmp_path, "--asyncio-mode=auto")
    assert code == 0, output


async def test_storage_from_a_handler(module: types.ModuleType) -> None:
    asked: list[tuple[str, str, bytes]] = []

    async def answer(request: Request) -> JSONResponse:
        asked.append((request.method, request.url.path, await request.body()))
        return JSONResponse({"Key": "x", "Id": "x", "signedURL": "/object/sign/bills/7/1.txt?token=t"})

    app = Starlette(routes=[Route("/{path:path}", answer, methods=["POST"])])
    handler = run(example("Storage, Auth and PostgREST from a handler"), module)["bill"]
    async with serve(app, "127.0.0.1", 0) as served:
        clients = SupabaseClients(
            Settings(
                _env_file=None,  # type: ignore[call-arg] # as config.settings does
                supabase_url=served.url,
                service_role_key="sb_secret_of_nobody",
                database_url="postgresql://u:p@127.0.0.1:1/x",
                redis_url="redis://127.0.0.1:1",
            )
        )
        record = Record({"id": 1, "customer_id": 7, "amount": Decimal("9.50")})
        change = Change(
            position=Position(1, 0), schema="public", table="orders", type="INSERT", record=record
        )
        await handler(change, None, Context(None, None, "key", clients.get))  # type: ignore[arg-type] # not used
        await clients.close()
    assert [path for _, path, _ in asked] == [
        "/storage/v1/object/bills/7/1.txt",
        "/storage/v1/object/sign/bills/7/1.txt",
        "/rest/v1/rpc/send_mail",
    ]
    assert b"9.50" in asked[0][2]
    assert b"token=t" in asked[2][2]
