"""`backfill`: rows that were there before, given to derive handlers beside live changes."""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from standin.server.tokens import project_key
from tests.e2e import shop as handlers
from tests.e2e.backfilling import backfill
from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer
from tests.stack import SECRET, Project, Servers, project

SLOT = "of_backfills"
ROWS = 12_500
BEFORE = (
    "insert into orders (id, customer_id, amount)"
    f" select n, 1000 + n % 300, n from generate_series(100001, {100_000 + ROWS}) n"
)


@pytest.fixture
async def shop(shared: Servers, request: pytest.FixtureRequest) -> AsyncIterator[Project]:
    delivery = getattr(request, "param", "proven")
    settings = {"WORKER_DELIVERY": delivery, "WORKER_SLOT": SLOT, "SUPABASE_JWT_SECRET": SECRET}
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **settings) as made:
        await made.db.execute(BEFORE)
        yield made
        await made.kill_all(SLOT)


async def listening(shop: Project) -> Any:
    process = await shop.listener(wait=False)
    await process.said("listening")
    return process


async def refused(shop: Project, *options: str) -> tuple[int, str]:
    code, output = await shop.run("backfill", *options)
    (line,) = re.findall(r"^tailrace: (.*)$", output, re.MULTILINE)
    return code, line


@pytest.mark.parametrize("shop", ["proven", "plain"], indirect=True)
async def test_a_table_is_backfilled_beside_live_changes_and_a_killed_listener(shop: Project) -> None:
    listener = await listening(shop)
    await shop.worker()
    writer = Writer(shop, seed=3)
    writing = asyncio.create_task(writer.write(300, pace=0.01))
    (asked,) = await backfill(shop, "orders", "--rate", "500", "--no-wait")
    assert (asked["handler"], asked["schema"], asked["table"]) == ("totals", "public", "orders")
    await shop.until("select cursor is not null from tailrace.backfills", value=True)
    await listener.kill()
    passed = await shop.db.fetchval("select rows from tailrace.backfills")
    assert 0 < passed < ROWS
    listener = await listening(shop)
    (done,) = await backfill(shop, "orders", "--resume", "--rate", "1000000", "--wait")
    assert done["state"] == "done"
    await writing
    # Live orders have lower numbers, so each old row was read once after what was passed, or before it.
    assert ROWS <= done["rows"] <= ROWS + writer.committed
    await shop.until(DIFFERENCES, 0)
    assert await shop.db.fetchval("select count(*) from derived_totals where customer_id >= 1000") == 300
    code, output = await shop.run("backfill")
    assert code == 0
    assert "done" in output
    assert (await shop.get(listener, "/status")).json()["backfills"] == []


async def test_some_rows_alone_and_one_that_is_cancelled_and_goes_on(shop: Project) -> None:
    await listening(shop)
    await shop.worker()
    (some,) = await backfill(shop, "orders", "--where", "customer_id = 1007 and status = 'new'", "--wait")
    assert (some["state"], some["keys"]) == ("done", 1)
    assert [row[0] for row in await shop.db.fetch("select customer_id from derived_totals")] == [1007]
    await backfill(shop, "orders", "--handler", "totals", "--rate", "50", "--no-wait")
    code, line = await refused(shop, "orders", "--no-wait")
    assert (code, "follow it with --resume, or cancel it first" in line) == (1, True)
    await shop.until("select count(*) from tailrace.backfills where cursor is not null", 1)
    (cancelled,) = await backfill(shop, "orders", "--cancel")
    assert cancelled["state"] == "cancelled"
    assert await refused(shop, "orders", "--cancel") == (1, "no backfill of orders is waiting or running")
    (done,) = await backfill(shop, "orders", "--resume", "--rate", "1000000", "--wait")
    assert (done["id"], done["state"]) == (cancelled["id"], "done")
    assert ROWS <= done["rows"] <= ROWS + 5_000  # a stretch that was in hand may be read again
    await shop.until(DIFFERENCES, 0)


async def test_what_makes_no_sense_is_refused_in_one_line(shop: Project) -> None:
    await listening(shop)
    for options, code, words in (
        (["nowhere"], 1, "no active handler follows public.nowhere"),
        (["orders", "--handler", "nobody"], 1, "no active handler nobody follows public.orders"),
        (["orders", "--where", "custmer_id = 1"], 1, 'column "custmer_id" does not exist'),
        (["orders", "--where", "1 = 1; drop table orders"], 1, "--where is no condition on public.orders"),
        (["orders", "--resume"], 1, "no backfill of orders is waiting, running or cancelled"),
        (["orders", "--resume", "--cancel"], 2, "exclude each other"),
        (["--cancel"], 2, "name the table"),
    ):
        given, line = await refused(shop, *options)
        assert given == code, line
        assert words in line
    assert await shop.db.fetchval("select count(*) from tailrace.backfills") == 0


async def test_operators_ask_for_it_over_http(shop: Project) -> None:
    listener = await listening(shop)
    await shop.worker()
    key = shop.environment["SUPABASE_SERVICE_ROLE_KEY"]
    user = project_key("authenticated", SECRET)
    url = (await listener.said("health of the"))["url"]
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:

        async def ask(method: str, path: str, token: str | None = key, **body: Any) -> tuple[int, Any]:
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            answer = await http.request(method, path, headers=headers, json=body or None)
            return answer.status_code, answer.json()

        for token, code in ((None, 401), (user, 403)):
            for method, path in (
                ("GET", "/backfills"),
                ("POST", "/backfills"),
                ("POST", "/backfills/1/cancel"),
                ("POST", "/backfills/1/resume"),
            ):
                assert (await ask(method, path, token))[0] in {code, 401}, path
        assert (await ask("POST", "/backfills", table="nowhere"))[0] == 409
        assert (await ask("POST", "/backfills", table="orders", where="true"))[0] == 400
        assert (await ask("POST", "/backfills", table="orders", rate=0))[0] == 400
        assert (await ask("POST", "/backfills/99/cancel"))[0] == 404
        code, told = await ask("POST", "/backfills", table="orders", rate=50)
        assert code == 200, told
        (made,) = told["backfills"]
        assert (await ask("POST", f"/backfills/{made['id']}/cancel"))[1]["state"] == "cancelled"
        assert (await ask("POST", f"/backfills/{made['id']}/cancel"))[0] == 409
        assert (await ask("POST", f"/backfills/{made['id']}/resume", rate=10**6))[1]["state"] == "waiting"
        await shop.until(f"select state = 'done' from tailrace.backfills where id = {made['id']}", value=True)
        listed = (await ask("GET", "/backfills"))[1]["backfills"]
        assert [(one["id"], one["state"]) for one in listed] == [(made["id"], "done")]
    await shop.until(DIFFERENCES, 0)
