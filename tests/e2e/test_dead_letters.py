"""Operators at work: every command and every route for dead letters and lanes, on real processes."""

import getpass
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import jwt
import pytest

from standin.server.tokens import project_key
from tests.e2e import shop as handlers
from tests.e2e.test_proven import drop_slot, ready
from tests.stack import SECRET, Project, Servers, project

LISTED = {
    "id",
    "handler",
    "schema",
    "table",
    "type",
    "key",
    "position",
    "attempts",
    "status",
    "error_class",
    "error",
    "first_failed_at",
    "last_failed_at",
}
AUDIT = (
    "select who, via, action, handler, dead_letter, lane_key, details::text from tailrace.audit order by id"
)
READER = """
create role reader login password 'secret';
create role stranger login password 'secret';
grant usage on schema tailrace to reader;
grant select on all tables in schema tailrace to reader;
"""
VERSIONS = (
    "select string_agg(order_id || ':' || version, ' ' order by order_id, seq) from derived_log"
    " where order_id in (1, 2, 3)"
)


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    environment = {"WORKER_DELIVERY": "proven", "WORKER_LANES": "4", "WORKER_MAX_ATTEMPTS": "1"}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **environment) as made:
        yield made
        await drop_slot(made)


async def asked(shop: Project, *command: str) -> Any:
    """Run a command that must succeed; returns its JSON."""
    code, output = await shop.run(*command, "--json")
    assert code == 0, output
    return json.loads(output)


async def refused(shop: Project, *command: str, code: int = 1, **environment: str) -> str:
    """Run a command that must be refused, in one line."""
    found, output = await shop.run(*command, **environment)
    assert found == code, output
    (line,) = output.splitlines()
    assert line.startswith("tailrace: ")
    return line


async def poison(shop: Project) -> None:
    """Have each of the orders 1 to 3 inserted, updated twice and given up each time, but for order 3."""
    await shop.db.execute("insert into derived_poison values (1), (2)")
    await shop.db.execute(
        "insert into orders (id, customer_id, amount) select n, n, 10 from generate_series(1, 3) n"
    )
    for version in (1, 2):
        await shop.db.execute("update orders set version = $1", version)
    await shop.until("select count(*) from tailrace.held where status = 'dead'", 6)
    await shop.until("select count(*) from derived_log", 3)


async def counted(shop: Project) -> Any:
    """Let all be counted again; it must add up."""
    code, output = await shop.run("status", "--verify", "--json")
    told = json.loads(output[output.index("{") :])
    assert (code, told["verification"]["problems"]) == (0, [])
    return told


async def test_dead_letters_are_found_looked_at_and_redriven_in_order(shop: Project) -> None:
    await ready(shop)
    await shop.worker()
    await poison(shop)

    (failure,) = (await shop.get(shop.processes[0], "/status")).json()["failures"]
    assert failure.pop("oldest_seconds") >= 0
    assert failure == {
        "handler": "log",
        "error_class": "ValueError",
        "status": "dead",
        "changes": 6,
        "attempts": 6,
    }
    found = await asked(shop, "dead-letters", "list")
    assert [one["id"] for one in found] == sorted(one["id"] for one in found)
    first, second, third = (one["id"] for one in found if one["key"] == [1])
    *_, sixth = (one["id"] for one in found if one["key"] == [2])
    assert [one["type"] for one in found if one["key"] == [2]] == ["INSERT", "UPDATE", "UPDATE"]
    assert all(one.keys() == LISTED for one in found)
    assert {(one["schema"], one["table"], one["handler"], one["error_class"]) for one in found} == {
        ("public", "orders", "log", "ValueError")
    }
    only = ["--handler", "log", "--table", "orders", "--error-class", "ValueError", "--since", "1h"]
    told = await asked(shop, "dead-letters", "show", str(second))
    assert (told["record"]["version"], told["old_record"]["version"], told["audit"]) == (1, 0, [])
    assert "this order is poison" in told["traceback"]
    code, output = await shop.run("dead-letters", "redrive", "--all", "--dry-run")
    assert (code, "public.orders" in output, output.count("ValueError")) == (0, True, 6)
    assert await shop.db.fetchval("select count(*) from tailrace.held where status = 'dead'") == 6
    await shop.db.execute("delete from derived_poison")
    told = await asked(shop, "dead-letters", "redrive", str(sixth), str(first), "--by", "anna")
    assert [(one["id"], one["newer"]["count"]) for one in told] == sorted([(first, 0), (sixth, 0)])
    await shop.until("select count(*) from derived_log", 5)
    edited = '{"version": 410041, "status": "mended"}'
    await asked(shop, "dead-letters", "redrive", str(second), "--record", edited)
    await shop.until("select count(*) from derived_log", 6)
    await asked(shop, "dead-letters", "discard", str(third))
    await asked(shop, "dead-letters", "redrive", *only)
    await shop.until("select count(*) from derived_log", 8)
    assert await shop.db.fetchval(VERSIONS) == "1:0 1:410041 2:2 2:0 2:1 3:0 3:1 3:2"
    told = await counted(shop)
    assert {name: told["handlers"]["log"][name] for name in ("read", "applied", "dead", "filtered")} == {
        "read": 9,
        "applied": 8,
        "dead": 0,
        "filtered": 1,
    }
    trail = [tuple(row) for row in await shop.db.fetch(AUDIT)]
    me = getpass.getuser()
    assert [row[:3] for row in trail] == [
        ("anna", "command", "redrive"),
        ("anna", "command", "redrive"),
        (me, "command", "redrive"),
        (me, "command", "discard"),
        (me, "command", "redrive"),
        (me, "command", "redrive"),
    ]
    assert [row[4] for row in trail[:3]] == [*sorted([first, sixth]), second]
    assert json.loads(trail[2][6]) == {
        "before": {"version": "1", "status": "new"},
        "after": {"version": "410041", "status": "mended"},
    }
    logs = "".join(process.text for process in shop.processes)
    assert "mended" not in logs


async def test_what_cannot_be_done_is_refused_in_one_line(shop: Project) -> None:
    assert "no dead letter 17" in await refused(shop, "dead-letters", "show", "17")
    assert "no dead letters 17, 18" in await refused(shop, "dead-letters", "redrive", "18", "17")
    assert "no handler nobody" in await refused(shop, "lanes", "pause", "nobody", "--lane-key", "7")
    assert "no handler nobody" in await refused(shop, "dead-letters", "redrive", "--handler", "nobody")
    assert "--all means" in await refused(shop, "dead-letters", "discard", code=2)


@pytest.mark.slow
@pytest.mark.timeout(400)  # many processes, one after the other
async def test_commands_choose_by_handler_table_error_class_and_time(shop: Project, tmp_path: Path) -> None:
    await ready(shop)
    await shop.worker()
    await poison(shop)
    for options, count in [
        (["--handler", "log", "--table", "public.orders", "--error-class", "ValueError", "--since", "1h"], 6),
        (["--error-class", "KeyError"], 0),
        (["--table", "orders", "--until", "2020-01-31T09:00"], 0),
        (["--handler", "totals"], 0),
    ]:
        assert len(await asked(shop, "dead-letters", "list", *options)) == count, options
    code, output = await shop.run("dead-letters", "list", "--limit", "4")
    assert (code, output.count("ValueError"), "more than the 4 shown" in output) == (0, 4, True)
    first, second, *_ = (one["id"] for one in await asked(shop, "dead-letters", "list"))
    told = await asked(shop, "dead-letters", "discard", "--handler", "log", "--dry-run")
    assert len(told) == await shop.db.fetchval("select count(*) from tailrace.held") == 6
    told = await asked(shop, "dead-letters", "discard", "--table", "orders", "--until", "1h")
    assert told == await asked(shop, "dead-letters", "redrive", "--handler", "totals") == []
    (tmp_path / "record.json").write_text('{"version": 77}')
    await shop.db.execute("delete from derived_poison")
    await asked(shop, "dead-letters", "redrive", str(first), "--record-file", str(tmp_path / "record.json"))
    await shop.until("select count(*) from derived_log where version = 77", 1)
    told = await asked(shop, "dead-letters", "discard", "--error-class", "ValueError", "--since", "1h")
    assert [one["status"] for one in told] == ["discarded"] * 5
    assert second in {one["id"] for one in told}
    assert await shop.db.fetchval("select count(*) from tailrace.held") == 0
    await counted(shop)


@pytest.mark.slow
@pytest.mark.timeout(400)  # many processes, one after the other
async def test_commands_need_rights_on_the_tables(shop: Project) -> None:
    listener = await shop.listener(wait=False)
    await listener.said("listening")
    await shop.worker()
    await poison(shop)
    await shop.db.execute(READER)
    first = str((await asked(shop, "dead-letters", "list"))[0]["id"])
    reading = [("dead-letters", "list"), ("dead-letters", "show", first), ("lanes", "list")]
    deciding = [
        ("dead-letters", "redrive", first),
        ("dead-letters", "discard", first),
        ("lanes", "pause", "log"),
        ("lanes", "pause", "log", "--lane-key", "1"),
        ("lanes", "resume", "log"),
    ]
    parts = urlsplit(shop.database_url)
    place = parts.netloc.rpartition("@")[2]
    for user, allowed, refused_ in [("reader", reading[:1], deciding), ("stranger", [], reading)]:
        url = urlunsplit(parts._replace(netloc=f"{user}:secret@{place}"))
        for command in allowed:
            assert (await shop.run(*command, DATABASE_URL=url))[0] == 0, command
        for command in refused_:
            line = await refused(shop, *command, DATABASE_URL=url)
            assert "the user of DATABASE_URL may not do that (permission denied" in line, command
            assert "secret" not in line
    assert await shop.db.fetchval("select count(*) from tailrace.audit") == 0
    await shop.db.execute("drop owned by reader; drop role reader, stranger")


async def test_a_handler_and_a_lane_key_are_paused_over_restarts_and_resumed(shop: Project) -> None:
    listener = await shop.listener(wait=False)
    await listener.said("listening")
    await asked(shop, "lanes", "pause", "log", "--lane-key", "2", "--by", "anna")
    told = await asked(shop, "lanes", "pause", "totals")
    assert (told["paused"], told["changed"]) == (True, True)
    worker = await shop.worker()
    await shop.db.execute("insert into orders (id, customer_id) select n, n from generate_series(1, 3) n")
    await shop.until("select count(*) from derived_log", 2)
    await shop.until("select count(*) from tailrace.held where status = 'parked'", 3)
    assert (await worker.terminate(), await listener.terminate()) == (0, 0)
    await ready(shop)
    await shop.worker()
    await shop.db.execute("update orders set version = 1")
    await shop.until("select count(*) from derived_log", 4)
    await shop.until("select sum(read)::int from tailrace.lanes where handler = 'totals'", 6)
    assert await shop.db.fetchval("select count(*) from derived_totals") == 0
    listed = {one["handler"]: one for one in await asked(shop, "lanes", "list")}
    assert (listed["totals"]["paused"], listed["totals"]["parked"]) == (True, 6)
    assert (listed["log"]["paused"], listed["log"]["held"]) == (False, 2)
    assert listed["log"]["paused_keys"] == ['["public.orders","2"]']
    await asked(shop, "lanes", "resume", "totals")
    await asked(shop, "lanes", "resume", "log", "--lane-key", '["public.orders", "2"]')
    await shop.until("select count(*) from derived_log", 6)
    await shop.until(handlers.DIFFERENCES, 0)
    assert await shop.db.fetchval(VERSIONS) == "1:0 1:1 2:0 2:1 3:0 3:1"
    told = await counted(shop)
    assert told["handlers"]["totals"]["applied"] == told["handlers"]["log"]["applied"] == 6
    assert tuple(await shop.db.fetchrow(AUDIT))[:4] == ("anna", "command", "pause", "log")


def user(shop: Project, *, role: str | None, lives: int = 60, secret: str = SECRET) -> str:
    """Sign a user's token, as the project's Auth does."""
    claims = {
        "sub": "5f3c0000-0000-4000-8000-000000000001",
        "role": "authenticated",
        "aud": "authenticated",
        "iss": f"{shop.standin.supabase_url}/auth/v1",
        "exp": int(time.time()) + lives,
        "app_metadata": {"role": role},
    }
    return jwt.encode(claims, secret, "HS256")


async def test_the_same_over_http_for_those_who_have_the_right(shop: Project) -> None:
    key = shop.standin.service_role_key
    listener = await shop.listener(wait=False, SUPABASE_JWT_SECRET=SECRET, WORKER_OPERATOR_ROLE="on-call")
    await listener.said("listening")
    await shop.worker()
    await poison(shop)
    url = (await listener.said("health of the"))["url"]
    async with httpx.AsyncClient(base_url=url, timeout=20) as client:

        async def ask(method: str, path: str, token: str | None = key, **more: Any) -> tuple[int, Any]:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            answer = await client.request(method, path, headers=headers, **more)
            return answer.status_code, answer.json()

        _, told = await ask("GET", "/dead-letters")
        first, second, third, *others = (one["id"] for one in told["dead_letters"])
        assert (len(others), told["next"]) == (3, None)
        paths = [
            ("GET", "/dead-letters"),
            ("GET", f"/dead-letters/{first}"),
            ("POST", f"/dead-letters/{first}/redrive"),
            ("POST", f"/dead-letters/{first}/discard"),
            ("POST", "/lanes/log/pause"),
            ("POST", "/lanes/log/resume"),
        ]
        strangers = {
            None: 401,
            "sb_secret_of_nobody": 401,
            user(shop, role="on-call", lives=-60): 401,
            user(shop, role="on-call", secret="another secret, which is long enough too"): 401,
            user(shop, role=None): 403,
            project_key("anon", SECRET): 403,
        }
        for method, path in paths:
            for token, code in strangers.items():
                assert (await ask(method, path, token))[0] == code, (path, token)
        assert await shop.db.fetchval("select count(*) from tailrace.audit") == 0

        on_call = user(shop, role="on-call")
        assert (await ask("GET", "/dead-letters", params={"limit": 2}))[1]["next"] == second
        for query, count in [
            (f"after={second}", 4),
            ("handler=log&table=orders&error_class=ValueError&since=1h", 6),
            ("until=1h", 0),
            ("handler=totals", 0),
        ]:
            code, told = await ask("GET", f"/dead-letters?{query}", on_call)
            assert (code, len(told["dead_letters"])) == (200, count), query
        code, told = await ask("GET", f"/dead-letters/{first}", on_call)
        assert (code, told["id"], told["record"]["version"]) == (200, first, 0)

        await shop.db.execute("delete from derived_poison")
        assert (await ask("POST", f"/dead-letters/{first}/discard", on_call))[0] == 200
        assert (await ask("POST", f"/dead-letters/{second}/redrive"))[0] == 200
        code, told = await ask(
            "POST", f"/dead-letters/{third}/redrive", on_call, json={"record": {"version": 41}}
        )
        assert (code, told["status"]) == (200, "retrying")
        await shop.until("select count(*) from derived_log", 5)
        assert await shop.db.fetchval("select count(*) from derived_log where version = 41") == 1

        assert (await ask("POST", "/lanes/totals/pause", on_call))[1]["paused"]
        assert (await ask("POST", "/lanes/log/pause", json={"lane_key": [3]}))[1]["changed"]
        await shop.db.execute("update orders set version = 7")
        await shop.until("select count(*) from derived_log where version = 7", 2)
        assert (await ask("POST", "/lanes/log/resume", json={"lane_key": "3"}))[0] == 200
        assert (await ask("POST", "/lanes/totals/resume"))[1]["changed"]
        await shop.until("select count(*) from derived_log where version = 7", 3)
        await shop.until(handlers.DIFFERENCES, 0)

        for code, method, path, body in [
            (404, "GET", "/dead-letters/17000", None),
            (404, "POST", f"/dead-letters/{first}/redrive", None),
            (404, "POST", f"/dead-letters/{10**30}/discard", None),
            (404, "POST", "/lanes/nobody/pause", None),
            (404, "GET", "/dead-letters?handler=nobody", None),
            (404, "POST", "/lanes/log/resume", {"lane_key": "3"}),
            (409, "POST", "/lanes/log/pause", {"lane_key": "three"}),
            (409, "POST", f"/dead-letters/{others[0]}/redrive", {"record": {"id": 5}}),
            (400, "POST", f"/dead-letters/{others[0]}/redrive", {"record": [5]}),
            (400, "POST", f"/dead-letters/{others[0]}/discard", {"record": {}}),
            (400, "POST", f"/dead-letters/{others[0]}/redrive", [1]),
            (400, "GET", "/dead-letters?since=soon", None),
            (400, "GET", "/dead-letters?limit=0", None),
            (400, "GET", "/dead-letters?ids=1", None),
            (405, "POST", "/dead-letters", None),
        ]:
            found, told = await ask(method, path, on_call, json=body) if body else await ask(method, path)
            assert found == code, (path, told)
            assert "\n" not in told["error"]
    assert {tuple(row[:2]) for row in await shop.db.fetch(AUDIT)} == {
        ("service_role", "http"),
        ("5f3c0000-0000-4000-8000-000000000001", "http"),
    }
    said = [line for line in listener.lines if line["message"] == "an operator has decided"]
    assert len(said) == await shop.db.fetchval("select count(*) from tailrace.audit") == 7
    assert key not in listener.text
    await counted(shop)
