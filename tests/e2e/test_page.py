"""The dashboard of a real listener: it follows the state, carries out what is asked, and holds up no end."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.browser import MISSING, PATH, browser
from tests.e2e import hostile_handlers
from tests.e2e import shop as handlers
from tests.e2e.hostile_handlers import MARKUP
from tests.e2e.test_failing import QUICK
from tests.e2e.test_proven import PROVEN, drop_slot, ready
from tests.stack import SECRET, Project, Servers, project


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    async with project(shared, handlers.TABLES, "tests.e2e.shop", **PROVEN) as made:
        yield made
        await drop_slot(made)


async def test_who_looks_sees_what_happens_and_lets_the_listener_end(shop: Project) -> None:
    await ready(shop)
    listener = shop.processes[0]
    page = await shop.get(listener, "/")
    assert (page.status_code, "EventSource" in page.text) == (200, True)
    await shop.worker()
    url = (await listener.said("health of the"))["url"]
    seen = asyncio.Event()

    async def look() -> None:
        async with (
            httpx.AsyncClient(trust_env=False, timeout=30) as client,
            client.stream("GET", f"{url}/events") as answer,
        ):
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    told = json.loads(line.removeprefix("data: "))
                    if told["handlers"]["log"]["applied"] == 5:
                        seen.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(look(), name="test: look")
        await shop.db.execute("insert into orders (customer_id) select 1 from generate_series(1, 5)")
        async with asyncio.timeout(30):
            await seen.wait()
        # The stream ends by itself: `look` returns, and what the server had to cut off it would log.
        assert await listener.terminate() == 0
    assert not [line for line in listener.lines if line.get("level") in ("error", "critical")]


@pytest.fixture
async def hostile(shared: Servers) -> AsyncIterator[Project]:
    made_of = (hostile_handlers.TABLES, "tests.e2e.hostile_handlers")
    async with project(shared, *made_of, **QUICK, SUPABASE_JWT_SECRET=SECRET) as made:
        yield made
        await drop_slot(made)


@pytest.mark.skipif(PATH is None, reason=MISSING)
async def test_an_operator_mends_what_failed_in_a_browser(hostile: Project, tmp_path: Path) -> None:
    await ready(hostile)
    listener = hostile.processes[0]
    url = (await listener.said("health of the"))["url"]
    assert url.startswith("http://127.0.0.1:")
    await hostile.worker()
    note = "<script>alert(2)</script>"
    await hostile.db.execute(f'insert into "{MARKUP}" (note) values ($1), ($1)', note)
    await hostile.until("select count(*) from tailrace.held where status = 'dead'", 2)

    letters = "document.querySelectorAll('#letter-rows tbody tr').length"
    async with browser(tmp_path / "browser") as page:
        await page.goto(url)
        await page.until("document.querySelector('#failures').innerText.includes('MarkupError')")
        assert note not in await page.js("document.body.textContent")
        await page.tab_to("sign")
        await page.press("Enter")
        await page.write(hostile.standin.service_role_key)
        await page.press("Enter")
        await page.until(f"{letters} === 2")
        await page.js("document.querySelector('#letter-rows button').click()")
        await page.until("document.querySelector('dialog[open]')")
        assert note not in await page.js("document.body.textContent")
        await page.press("Escape")
        await page.js("document.querySelector('#values').click()")
        assert await page.js(
            f"document.querySelector('#letters').textContent.includes({f'{note} is poison'!r})"
        )
        assert MARKUP in await page.text("#handlers")

        # Paused, what is redriven waits; then both are applied.
        await page.tab_to("Pause notes")
        await page.press("Enter")
        await page.until("document.querySelector('dialog[open]')")
        await page.press("Enter")
        await hostile.until("select paused from tailrace.handlers", value=True)
        await page.until("document.querySelector('#handlers').innerText.includes('paused')")
        await hostile.db.execute("insert into derived_mended default values")
        await page.tab_to("redrive-all")
        await page.press("Enter")
        await page.tab_to("Redrive")
        await page.press("Enter")
        await page.until(f"{letters} === 0")
        await page.until("document.querySelector('#handlers button').innerText === 'Resume'")
        assert await hostile.db.fetchval("select count(*) from derived_notes") == 0
        await page.js("document.querySelector('#handlers button').focus()")
        await page.press("Space")
        await hostile.until("select count(*) from derived_notes", 2)
        assert page.complaints == []
        assert {httpx.URL(one).host for one in page.requests} == {"127.0.0.1"}
    who = "select distinct who || ' ' || via || ' ' || action from tailrace.audit order by 1"
    assert [row[0] for row in await hostile.db.fetch(who)] == [
        f"service_role http {action}" for action in ("pause", "redrive", "resume")
    ]


async def test_what_is_held_is_told_to_operators_before_it_is_dead(hostile: Project) -> None:
    # So long that no retry comes in between, for the time to it is drawn at random below that.
    slow = dict.fromkeys(("WORKER_BACKOFF_SECONDS", "WORKER_BACKOFF_MAX_SECONDS"), "10000000")
    listener = await hostile.listener(wait=False, **slow)
    await listener.said("listening")
    await hostile.worker(**slow)
    await hostile.db.execute(f'insert into "{MARKUP}" (note) values ($1)', "first")
    await hostile.until("select count(*) from tailrace.held where attempts > 0", 1)
    await hostile.db.execute(f'update "{MARKUP}" set note = $1', "second")
    await hostile.until("select count(*) from tailrace.held", 2)
    url = (await listener.said("health of the"))["url"]
    headers = {"Authorization": f"Bearer {hostile.standin.service_role_key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, trust_env=False) as client:
        (one,) = (await client.get("/held", params={"handler": "notes"})).json()["held"]
        assert (one["status"], one["error"], one["attempts"]) == ("retrying", "first is poison", 1)
        assert one["next_attempt_at"] > one["last_failed_at"]
        shown = (await client.get(f"/held/{one['id']}")).json()
        assert (shown["record"], shown["table"]) == ({"id": 1, "note": "first"}, MARKUP)
        assert (await client.get("/dead-letters")).json()["dead_letters"] == []
        for path, code in (
            (f"/dead-letters/{one['id']}", 404),
            ("/held/17000", 404),
            ("/held?handler=x", 404),
        ):
            answer = await client.get(path)
            assert (answer.status_code, "there is no" in answer.text or "is held" in answer.text) == (
                code,
                True,
            )
        (lanes,) = (await client.get("/lanes")).json()["lanes"]
        assert (lanes["handler"], lanes["held"]) == ("notes", 2)
        told = (await client.get("/status")).json()["handlers"]["notes"]
        assert (told["kind"], told["tables"]) == ("change", [f"public.{MARKUP}"])
        # Lanes by number: both changes wait in the one that has their key.
        assert (told["lanes"]["count"], sorted(told["lanes"]["holding"])) == (4, [0, 0, 0, 2])
