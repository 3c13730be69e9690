"""Webhooks: what is taken and what is refused over HTTP, and what becomes of it."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette

from tests.stack import ROOT, Process, Project, Servers, project
from worker.catalogue import read_catalogue
from worker.change import Position
from worker.database import make_engine
from worker.errors import MalformedChange
from worker.hooks import MOST_BYTES, Inbox, InboxFullError, raw_change, read_hook
from worker.queue import connection_pool
from worker.rows.repair import build_changes
from worker.web import hook_route, serve

SECRET = "the secret of the webhooks"
GOOD = {"type": "INSERT", "table": "t", "schema": "public", "record": {"id": 1}, "old_record": None}


@asynccontextmanager
async def asked(put: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = Starlette(routes=[hook_route(SECRET, put)])
    async with (
        serve(app, "127.0.0.1", 0) as served,
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
    ):
        client.headers["Authorization"] = f"Bearer {SECRET}"
        yield client


async def test_only_who_knows_the_secret_is_heard() -> None:
    put: list[bytes] = []

    async def keep(body: bytes) -> None:
        put.append(body)

    async with asked(keep) as client:
        assert (await client.post("/hooks/changes", json=GOOD)).status_code == 200
        for given in ("", "Bearer", f"Bearer {SECRET}x", SECRET, "Bearer wrong"):
            answer = await client.post("/hooks/changes", json=GOOD, headers={"Authorization": given})
            assert answer.status_code == 401
            assert "WORKER_HOOK_SECRET" in answer.json()["error"]
        assert (await client.get("/hooks/changes")).status_code == 405
    assert [json.loads(body) for body in put] == [GOOD]


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        b"[]",
        b"{",
        b'{"type":"INSERT"}',
        json.dumps(GOOD | {"type": "secret"}).encode(),
        json.dumps(GOOD | {"type": "UPDATE"}).encode(),
        json.dumps(GOOD | {"record": None}).encode(),
        json.dumps(GOOD | {"type": "DELETE"}).encode(),
        json.dumps(GOOD | {"record": ["secret"]}).encode(),
        b'{"type":"INSERT","table":"t","schema":"s","record":' + b'{"a":' * 5000,
    ],
)
async def test_what_is_no_webhook_is_refused_without_its_values(wrong: bytes) -> None:
    async def never(_: bytes) -> None:
        raise AssertionError

    async with asked(never) as client:
        answer = await client.post("/hooks/changes", content=wrong)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("this is no database webhook: ")
    assert "secret" not in answer.text


async def test_what_cannot_be_written_down_is_not_accepted() -> None:
    errors = iter([InboxFullError(), ConnectionError("no"), None])

    async def put(_: bytes) -> None:
        error = next(errors)
        if error is not None:
            raise error

    async with asked(put) as client:
        full = await client.post("/hooks/changes", json=GOOD)
        away = await client.post("/hooks/changes", json=GOOD)
        large = await client.post("/hooks/changes", content=b" " * (MOST_BYTES + 1))
    assert (full.status_code, away.status_code, large.status_code) == (503, 503, 413)
    assert "too many webhooks wait" in full.json()["error"]
    assert "Redis cannot be written (ConnectionError)" in away.json()["error"]


async def test_the_inbox_keeps_order_and_bounds(shared: Servers, request: pytest.FixtureRequest) -> None:
    async with Redis(connection_pool=connection_pool(shared.redis.url)) as redis:
        inbox = Inbox(redis, request.node.name, 3)
        for body in (b"a", b"b", b"c"):
            await inbox.put(body)
        with pytest.raises(InboxFullError):
            await inbox.put(b"d")
        taken = await inbox.take()
        assert [body for _, _, body in taken] == [b"a", b"b", b"c"]
        assert all(abs((datetime.now(UTC) - at).total_seconds()) < 60 for _, at, _ in taken)
        # Taken is not done: a listener that is killed in between takes them again.
        await inbox.done([taken[0][0]])
        assert [body for _, _, body in await inbox.take()] == [b"b", b"c"]
        await redis.aclose(close_connection_pool=True)


WIDE = r"""
create type mood as enum ('good', 'bad');
create table wide (
    id bigint primary key, n int, flag boolean, exact numeric(20, 5), far numeric, name text, code char(5),
    at timestamptz, day date, facts jsonb, tags text[], numbers int[], feels mood, raw bytea, took interval,
    token uuid, nothing text, f float8, "Odd Name" int
);
insert into wide values (
    9007199254740993, 3, true, 1.50000, 12345678901234567890.123456789, 'a "b"', 'ab',
    '2026-01-02 03:04:05.678+02', '2026-01-02', '{"a": [1, null]}', '{x,"y,z"}', '{1,null}', 'bad', '\x00ff',
    '2 days 1 second', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', null, 1e-7, 5
);
"""
# As supabase_functions.http_request makes it.
PAYLOAD = """
select jsonb_build_object(
    'type', 'UPDATE', 'table', 'wide', 'schema', 'public', 'record', to_jsonb(w), 'old_record', to_jsonb(w)
)::text from wide w
"""


async def test_values_are_those_of_the_row(shared: Servers) -> None:
    async with project(shared, WIDE, "handlers") as made:
        hook = read_hook((await made.db.fetchval(PAYLOAD)).encode())
        engine = make_engine(made.database_url, name="test", size=1)
        async with AsyncSession(engine) as session:
            catalogue = await read_catalogue(
                await session.connection(), "supabase_realtime", [("public", "wide")]
            )
            table = catalogue.tables["public", "wide"]
            raw = raw_change(hook, table, datetime(2026, 1, 1, tzinfo=UTC))
            (change,) = await build_changes(session, [table], [(Position(1, 0), raw, 1)])
        await engine.dispose()
        expected = dict(await made.db.fetchrow("select * from wide"))
        expected["facts"] = json.loads(expected["facts"])
    assert change.record == expected
    assert change.key == (9007199254740993,)
    assert change.commit_timestamp == datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(MalformedChange):
        read_hook(b"{}")


ITEMS = """
create table items (id bigint primary key, grp int, note text);
alter table items replica identity full;
create table derived_notes (seq bigserial, id bigint, note text);
"""
HANDLERS = "tests.integration.hook_handlers"


async def post(made: Project, listener: Process, **hook: Any) -> httpx.Response:
    said = await listener.said("health of the")
    async with httpx.AsyncClient(trust_env=False) as client:
        headers = {"Authorization": f"Bearer {SECRET}"}
        return await client.post(f"{said['url']}/hooks/changes", json=hook, headers=headers, timeout=10)


def row(id_: int, note: str) -> dict[str, Any]:
    return {"id": id_, "grp": 1, "note": note}


NOTES = "select coalesce(string_agg(note, ' ' order by seq), '') from derived_notes"


async def test_posted_changes_reach_their_handlers(shared: Servers) -> None:
    settings = {"WORKER_DELIVERY": "webhooks", "WORKER_HOOK_SECRET": SECRET}
    async with project(shared, ITEMS, HANDLERS, **settings) as made:
        listener = await made.listener(wait=False)
        said = await listener.said("listening")
        assert "webhooks" in said["reason"]
        standby = await made.listener(wait=False)
        await standby.said("another listener is active")
        await made.worker()
        of = {"schema": "public", "table": "items"}
        assert (await post(made, listener, **of, type="INSERT", record=row(1, "a"))).status_code == 200
        # A stand-by writes it down as well; tables of no handler are nobody's.
        moved = {"record": row(1, "b"), "old_record": row(1, "a")}
        assert (await post(made, standby, **of, type="UPDATE", **moved)).status_code == 200
        assert (
            await post(made, listener, **of | {"table": "x"}, type="DELETE", old_record={})
        ).status_code == 200
        assert (await post(made, listener, **of, type="DELETE", old_record=row(1, "b"))).status_code == 200
        await made.until(NOTES, "a b -")
        await listener.kill()
        assert (await post(made, standby, **of, type="INSERT", record=row(2, "c"))).status_code == 200
        await made.until(NOTES, "a b - c")
        status = (await made.get(standby, "/status")).json()
        assert status["reason"].startswith("WORKER_DELIVERY=webhooks")
        assert SECRET not in listener.text + standby.text


# What Supabase's function does, but for sending it: pg_net does that.
SENDER = """
create schema supabase_functions;
create table supabase_functions.sent (id bigserial, url text, method text, headers jsonb, body jsonb);
create function supabase_functions.http_request() returns trigger language plpgsql as $$
begin
  insert into supabase_functions.sent (url, method, headers, body) values (
    tg_argv[0], tg_argv[1], tg_argv[2]::jsonb,
    jsonb_build_object('old_record', old, 'record', new, 'type', tg_op, 'table', tg_table_name,
      'schema', tg_table_schema)
  );
  return coalesce(new, old);
end $$;
"""


async def test_the_trigger_of_the_page(shared: Servers) -> None:
    page = (ROOT / "docs/webhooks.md").read_text()
    (trigger,) = re.findall(r"^```sql\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (shell,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    settings = dict(line.split("=", 1) for line in shell.split())
    async with project(shared, ITEMS + SENDER, HANDLERS, **settings) as made:
        await made.db.execute(trigger.replace("public.orders", "public.items"))
        await made.db.execute("insert into items values (1, 1, 'a')")
        await made.db.execute("update items set note = 'b'")
        await made.db.execute("delete from items")
        listener = await made.listener(wait=False)
        await listener.said("listening")
        await made.worker()
        base = (await listener.said("health of the"))["url"]
        async with httpx.AsyncClient(trust_env=False) as client:
            for sent in await made.db.fetch("select * from supabase_functions.sent order by id"):
                url = sent["url"].replace("https://worker.example.com", base)
                headers = json.loads(sent["headers"])
                answer = await client.request(sent["method"], url, headers=headers, content=sent["body"])
                assert answer.status_code == 200, answer.text
        await made.until(NOTES, "a b -")


async def test_without_a_secret_nothing_starts(shared: Servers) -> None:
    async with project(shared, ITEMS, HANDLERS, WORKER_DELIVERY="webhooks") as made:
        code, output = await made.run("listen")
        assert code == 2
        assert "WORKER_DELIVERY=webhooks needs WORKER_HOOK_SECRET" in output
        code, output = await made.run("check")
        assert code == 1
        assert "needs WORKER_HOOK_SECRET" in " ".join(output.split())
