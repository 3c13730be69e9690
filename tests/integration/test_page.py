"""The dashboard over a real socket: what it lets nobody do, and what it shows and does in a real browser."""

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from standin.server.tokens import project_key
from tests.browser import MISSING, PATH, Page, browser
from tests.integration.dashboard import HOSTILE, KEY, SECRET, Remembering, Told, dashboard
from tests.unit.test_telemetry import state
from worker.web import page_routes, serve

in_a_browser = pytest.mark.skipif(PATH is None, reason=MISSING)


@asynccontextmanager
async def looked_at(told: Told, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        dashboard(told, **options) as served,
    ):
        client.base_url = served.url
        yield client


async def events(lines: AsyncIterator[str], count: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async for line in lines:
        if line.startswith("data: "):
            found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
    return found


async def test_the_page_allows_its_own_script_and_style_and_nothing_else() -> None:
    async with looked_at(Told()) as client:
        page = await client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    for part in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'none'", "trusted-types 'none'"):
        assert part in policy
    assert page.headers["x-frame-options"] == "DENY"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in page.headers
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert not re.search(r"\bsrc=|href=\"[^#]|@import|url\(|\bon\w+=\"|style=", page.text)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|cookie =", page.text
    )
    assert set(re.findall(r"https?://[^\"\s]+", page.text)) == {"http://www.w3.org/2000/svg"}


async def test_events_are_the_state_one_after_the_other() -> None:
    told = Told()
    told.parts["gaps"] = [{"cause": HOSTILE}]
    async with looked_at(told, every_seconds=0.01) as client, client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        first, second = await events(answer.aiter_lines(), 2)
    assert first["handlers"].keys() == second["handlers"].keys()
    assert first["gaps"][0]["cause"] == HOSTILE


async def test_those_who_look_share_what_is_read() -> None:
    told = Told()
    async with looked_at(told, every_seconds=3_600) as client:
        for _ in range(3):
            async with client.stream("GET", "/events") as answer:
                await events(answer.aiter_lines(), 1)
    assert told.asked == 1


async def test_a_state_that_cannot_be_read_is_an_event_without_secrets() -> None:
    told = Told()
    told.broken = True
    async with looked_at(told, every_seconds=3_600) as client, client.stream("GET", "/events") as answer:
        (event,) = await events(answer.aiter_lines(), 1)
    assert event["ready"] is False
    assert "RuntimeError" in event["reasons"][0]
    assert "hunter2" not in str(event)


async def test_there_is_a_bound_to_those_who_look() -> None:
    async with (
        looked_at(Told(), every_seconds=3_600, most_viewers=1) as client,
        client.stream("GET", "/events") as answer,
    ):
        await events(answer.aiter_lines(), 1)
        assert (await client.get("/events")).status_code == 503


async def test_the_end_of_the_process_ends_the_streams() -> None:
    closing = asyncio.Event()
    app = Starlette(routes=page_routes(Told().status, closing, every_seconds=3_600))
    async with httpx.AsyncClient(trust_env=False) as client:
        async with serve(app, "127.0.0.1", 0, closing=closing) as served:
            request = client.build_request("GET", f"{served.url}/events")
            answer = await client.send(request, stream=True)
            lines = answer.aiter_lines()
            await events(lines, 1)
        # Cut off by the server it would be an error.
        assert await events(lines, 1) == []
        await answer.aclose()


@pytest.mark.parametrize(
    ("server", "named", "allowed"),
    [
        ("127.0.0.1", "127.0.0.1:8080", True),
        ("127.0.0.1", "localhost:8080", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("::1", "[::1]:8080", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "evil.example", False),  # a name that was made to lead here
        ("127.0.0.1", "localhost.evil.example", False),
        ("127.0.0.1", "127.0.0.1.evil.example:80", False),
        ("127.0.0.1", "[::1", False),
        ("127.0.0.1", "", False),
        ("10.0.0.5", "10.0.0.5:8080", False),
        ("10.0.0.5", "localhost", False),
        ("2001:db8::5", "[2001:db8::5]", False),
    ],
)
async def test_by_default_it_is_shown_on_loopback_alone(server: str, named: str, allowed: bool) -> None:  # noqa: FBT001
    """What comes in by another address, as in a container, or under another name, is told what to do."""
    closing = asyncio.Event()
    closing.set()
    for options, code in (({}, 200 if allowed else 403), ({"shown": "everywhere"}, 200)):
        app = Starlette(routes=page_routes(Told().status, closing, **options))

        async def at(scope: Any, receive: Any, send: Any, app: Any = app) -> None:
            headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
            await app(
                scope | {"server": (server, 80), "headers": [*headers, (b"host", named.encode())]},
                receive,
                send,
            )

        async with httpx.AsyncClient(transport=httpx.ASGITransport(at), base_url="http://x") as client:
            for path in ("/", "/events"):
                answer = await client.get(path)
                assert answer.status_code == code, path
                assert ("WORKER_DASHBOARD=everywhere" in answer.text) == (code == 403)


async def test_it_can_be_switched_off() -> None:
    async with looked_at(Told(), shown="off") as client:
        assert [(await client.get(path)).status_code for path in ("/", "/events", "/livez")] == [
            404,
            404,
            200,
        ]


def with_key(**headers: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEY}"} | {name.replace("_", "-"): one for name, one in headers.items()}


FORM = "application/x-www-form-urlencoded"
CROSSING = [
    # What a page of another site can have a browser send; a form cannot send Authorization at all.
    ({"Origin": "https://evil.example", "Content-Type": FORM}, 403),
    ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site", "Content-Type": "text/plain"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Origin": "null", "Content-Type": FORM}, 403),
    (with_key(Origin="https://evil.example", Content_Type="application/json"), 403),
    (with_key(Origin="http://127.0.0.1:1", Content_Type="application/json"), 403),
    (with_key(Origin="null"), 403),
    (with_key(Origin="http://[::1"), 403),
    (with_key(Sec_Fetch_Site="same-site"), 403),
    # ... a form of any site, and scripts that spare themselves the question beforehand
    (with_key(Content_Type=FORM), 415),
    (with_key(Content_Type="text/plain"), 415),
    (with_key(Content_Type="multipart/form-data; boundary=x"), 415),
    (with_key(Content_Type=""), 415),
    # ... the token anywhere but in its header
    ({"Cookie": f"token={KEY}; Authorization=Bearer {KEY}", "Content-Type": "application/json"}, 401),
    ({}, 401),
    ({"Authorization": f"Basic {KEY}"}, 401),
]


@pytest.mark.parametrize(
    "path",
    [
        "dead-letters/1/redrive",
        "dead-letters/1/discard",
        "lanes/x/pause",
        "lanes/x/resume",
        "backfills",
        "backfills/1/cancel",
        "backfills/1/resume",
    ],
)
async def test_what_another_site_sends_decides_nothing(path: str) -> None:
    desk = Remembering(1)
    desk.fill(1, "public.orders", "x")
    async with dashboard(Told(), desk) as served, httpx.AsyncClient(trust_env=False) as client:
        for headers, code in CROSSING:
            answer = await client.post(f"{served.url}/{path}?token={KEY}", headers=headers)
            assert answer.status_code == code, headers
            assert answer.json()["error"]
            assert not [name for name in answer.headers if name.startswith("access-control")]
        # Nor may its scripts ask beforehand.
        asked = await client.options(
            f"{served.url}/{path}",
            headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        )
        assert asked.status_code == 405
        assert not [name for name in asked.headers if name.startswith("access-control")]
    assert desk.decided == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "SELF"},
        {"Origin": "SELF", "Sec-Fetch-Site": "same-origin"},
        # A proxy may call the listener by another name than the browser does.
        {"Origin": "https://tailrace.example", "Sec-Fetch-Site": "same-origin"},
    ],
    ids=["no browser", "a browser without TLS", "a browser", "behind a proxy"],
)
async def test_what_the_page_itself_and_commands_send_is_carried_out(headers: dict[str, str]) -> None:
    desk = Remembering(2)
    async with dashboard(Told(), desk) as served, httpx.AsyncClient(trust_env=False) as client:
        sent = with_key() | {name: served.url if one == "SELF" else one for name, one in headers.items()}
        one = await client.post(f"{served.url}/dead-letters/1/redrive", headers=sent)
        json_ = {"record": {"status": "paid"}}
        two = await client.post(f"{served.url}/dead-letters/2/redrive", headers=sent, json=json_)
        told = await client.get(f"{served.url}/operator", headers=sent)
    assert (one.status_code, two.status_code, told.json()) == (200, 200, {"name": "service_role"})
    assert desk.decided == [
        ("redrive", 1, None, "service_role"),
        ("redrive", 2, {"status": "paid"}, "service_role"),
    ]


@pytest.mark.parametrize(
    "path", ["operator", "dead-letters", "dead-letters/1", "held", "held/501", "lanes", "backfills"]
)
async def test_rows_and_keys_are_for_operators_alone(path: str) -> None:
    async with dashboard(Told(), Remembering(1)) as served, httpx.AsyncClient(trust_env=False) as client:
        for headers, code in (({}, 401), (anon(), 403), (with_key(), 200)):
            answer = await client.get(f"{served.url}/{path}", headers=headers)
            assert (answer.status_code, answer.headers["content-type"]) == (code, "application/json")
            assert ("secret row value" in answer.text) == (code == 200 and ("dead" in path or "held" in path))
        assert "secret" not in (await client.get(f"{served.url}/status")).text


def anon() -> dict[str, str]:
    return {"Authorization": f"Bearer {project_key('anon', SECRET)}"}


# In a browser


@pytest.fixture(scope="module")
async def one_browser(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Page]:
    async with browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
async def page(one_browser: Page) -> AsyncIterator[Page]:
    """A tab that nobody has complained in; each test serves on a port of its own, which is an origin."""
    one_browser.complaints.clear()
    one_browser.requests.clear()
    await one_browser.look()
    yield one_browser
    assert one_browser.complaints == []
    await one_browser.goto("about:blank")


ROWS = "document.querySelectorAll('#handlers tbody tr').length"
LETTERS = "document.querySelectorAll('#letter-rows tbody tr').length"
DIALOG = "document.querySelector('dialog[open]')"
# Past its last button the focus may be with the browser itself, as pages see it on the body.
INSIDE = "((one) => one === document.body || one.closest('dialog') !== null)(document.activeElement)"


async def sign_in(page: Page, token: str = KEY) -> None:
    """By keyboard alone."""
    await page.tab_to("sign")
    await page.press("Enter")
    await page.until(DIALOG)
    await page.write(token)
    await page.press("Enter")


FAILURE = {
    "handler": "totals",
    "error_class": "ValueError",
    "status": "dead",
    "changes": 1,
    "attempts": 8,
    "oldest_seconds": 1,
}
BACKFILL = {
    "id": 1,
    "handler": "totals",
    "table": "public.orders",
    "state": "running",
    "rows": 1,
    "keys": 1,
    "estimated": None,
    "rate": None,
    "closes_gap": False,
}


@in_a_browser
async def test_whatever_names_rows_and_errors_hold_is_shown_as_text(page: Page) -> None:
    told, desk = Told(9, text=HOSTILE), Remembering(2, text=HOSTILE)
    told.parts = {
        "reasons": [HOSTILE],
        "ready": False,
        "delivery": HOSTILE,
        "listener": HOSTILE,
        "workers": [HOSTILE],
        "gaps": [{"id": 1, "cause": HOSTILE, "tables": [HOSTILE], "since": HOSTILE, "until": HOSTILE}],
        "failures": [FAILURE | dict.fromkeys(("handler", "error_class"), HOSTILE)],
        "backfills": [BACKFILL | dict.fromkeys(("handler", "table", "state"), HOSTILE)],
        "slot": state()["slot"] | dict.fromkeys(("name", "wal_status", "transport"), HOSTILE),
    }
    desk.keys = [HOSTILE]
    async with dashboard(told, desk, every_seconds=0.1) as served:
        await page.goto(served.url)
        await sign_in(page)
        await page.until(f"{LETTERS} === 2")
        await page.js("document.querySelector('#values').click()")
        await page.until("document.querySelector('#letter-rows').textContent.includes('secret row value 1')")
        for name in ("Details of 1", "Discard 1"):
            await page.js(f"document.querySelector('[aria-label=\"{name}\"]').click()")
            await page.until(DIALOG)
            assert HOSTILE in await page.js("document.querySelector('dialog[open]').textContent")
            await page.js("document.querySelector('dialog[open]').close()")
            await page.until(f"!{DIALOG}")
        await page.js("document.querySelector('#handlers button[aria-label^=Pause]').click()")
        await page.until(DIALOG)
        await page.write("refused")
        await page.press("Enter")
        await page.until(
            "document.querySelector('dialog[open] [role=alert]').textContent.includes('no lane key')"
        )
        assert HOSTILE in await page.js("document.querySelector('dialog[open] [role=alert]').textContent")
        shown = await page.js("document.body.textContent")
        assert shown.count(HOSTILE) > 30
        made = await page.js(
            "[...new Set([...document.querySelectorAll('body *')].map((one) => one.tagName))]"
        )
        assert not {"IMG", "IFRAME", "OBJECT", "LINK"} & set(made)
        assert await page.js("document.querySelectorAll('script').length") == 1
        assert {httpx.URL(url).netloc for url in page.requests} == {httpx.URL(served.url).netloc}


@in_a_browser
async def test_the_policy_stops_what_would_write_html(page: Page) -> None:
    async with dashboard(Told()) as served:
        await page.goto(served.url)
        # Without the policy each of these would be carried out.
        for attempt in (
            "document.body.innerHTML = '<img src=x onerror=alert(1)>'",
            "document.createElement('script').text = 'alert(1)'",
        ):
            with pytest.raises(AssertionError, match=r"TrustedHTML|TrustedScript"):
                await page.js(attempt)
        await page.js(
            "document.body.append(Object.assign(document.createElement('img'), {src: 'http://127.0.0.1:9/x'}))"
        )
        assert (
            await page.js("fetch('http://127.0.0.1:9/').catch((error) => String(error))")
            == "TypeError: Failed to fetch"
        )
    refused = [
        one
        for one in page.complaints
        if "Content Security Policy" in one or "TrustedHTML" in one or "Trusted" in one
    ]
    assert refused
    assert refused == page.complaints
    page.complaints.clear()


@in_a_browser
async def test_what_nobody_knows_is_no_zero(page: Page) -> None:
    told = Told()
    async with dashboard(told, every_seconds=0.1) as served:
        await page.goto(served.url)
        await page.until("document.querySelector('#tiles').innerText.includes('queued\\n0')")
        one = next(iter(told.handlers.values()))
        one |= {"queued": None, "queued_bytes": None, "lanes": one["lanes"] | {"queued": None}}
        told.parts = {"workers": [], "counts": state()["counts"] | {"backlog": None}}  # Redis is away
        await page.until("document.querySelector('#tiles').innerText.includes('queued\\n?')")
        assert "workers\n?" in await page.text("#tiles")
        told.broken = True
        await page.until("document.querySelector('#reasons').innerText.includes('RuntimeError')")
        assert await page.text("#ready") == "not ready"
        assert await page.js(ROWS) == 1


@in_a_browser
async def test_values_are_hidden_until_they_are_asked_for(page: Page) -> None:
    desk = Remembering(2)
    desk.keys = ["secret key"]
    async with dashboard(Told(), desk, every_seconds=0.1) as served:
        await page.goto(served.url)
        await page.until(f"{ROWS} === 1")
        assert "signed" not in (await page.text("body")).lower()
        await sign_in(page)
        await page.until(f"{LETTERS} === 2")
        await page.js("document.querySelector('[aria-label=\"Details of 2\"]').click()")
        await page.until(DIALOG)
        # Not even where only a script would find them.
        before = await page.js("document.documentElement.outerHTML.replace(/<script>[^]*<.script>/, '')")
        assert "secret" not in before
        assert "builtins.ValueError" in before
        assert "Let the handler take it." in before
        await page.js("[...document.querySelectorAll('dialog[open] button')][0].click()")
        shown = await page.js("document.body.textContent")
        for one in ("secret row value 2", "secret note", "secret key", "Traceback", "9007199254740993"):
            assert one in shown, one
        await page.press("Escape")
        await page.until(f"!{DIALOG}")
        await page.js("document.querySelector('#sign').click()")
        await page.until("document.querySelector('#who').innerText === 'read-only'")
        assert "secret" not in await page.js("document.querySelector('main').textContent")
    assert await page.js("sessionStorage.length") == 0


@in_a_browser
async def test_a_token_stays_in_its_tab_and_is_sent_as_a_header(page: Page) -> None:
    async with dashboard(Told(), Remembering(1), every_seconds=0.1) as served:
        await page.goto(served.url)
        await sign_in(page, "no token at all")
        await page.until("document.querySelector('dialog[open] [role=alert]').textContent.includes('JWT')")
        await page.press("Escape")
        await page.until(f"!{DIALOG}")
        assert await page.focused() == "sign"
        assert await page.text("#who") == "read-only"
        assert await page.js("sessionStorage.length") == 0
        await sign_in(page)
        await page.until(f"{LETTERS} === 1")
        assert await page.text("#who") == "service_role"
        await page.goto(served.url)
        await page.until(f"{LETTERS} === 1")
        assert await page.js("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 1]
        assert not [url for url in page.requests if KEY in url]
        await page.js("document.querySelector('#sign').click()")
        await page.until("document.querySelector('#letters').hidden")
        assert await page.js("sessionStorage.length") == 0
        assert await page.js(
            "[...document.querySelectorAll('#handlers button')].every((one) => !one.offsetParent)"
        )
    # The first two refusals are the browser's own words about 401.
    page.complaints[:] = [one for one in page.complaints if "401" not in one]


@in_a_browser
async def test_dead_letters_are_decided_about_by_keyboard(page: Page) -> None:
    desk = Remembering(4)
    async with dashboard(Told(3), desk, every_seconds=0.1) as served:
        await page.goto(served.url)
        await sign_in(page)
        await page.until(f"{LETTERS} === 4")

        await page.tab_to("Redrive 1")
        await page.press("Enter")
        await page.until(f"{LETTERS} === 3")
        assert "Dead letter 1 is tried again, after 2 newer changes" in await page.text("#said")
        # The row is gone, and the focus is near where it was.
        assert await page.focused() == "t-letters"

        await page.tab_to("Discard 2")
        await page.press("Space")
        await page.until(DIALOG)
        assert await page.focused() == "Cancel"
        places = set()
        for shift in (False, True):
            for _ in range(6):
                await page.press("Tab", shift=shift)
                places.add(await page.js(INSIDE))
        assert places == {True}
        await page.press("Escape")
        await page.until(f"!{DIALOG}")
        assert await page.focused() == "Discard 2"
        assert desk.decided == [("redrive", 1, None, "service_role")]
        await page.press("Enter")
        await page.until(DIALOG)
        await page.tab_to("Discard")
        await page.press("Enter")
        await page.until(f"!{DIALOG}")
        await page.until(f"{LETTERS} === 2")

        await page.tab_to("Details of 3")
        await page.press("Enter")
        await page.until(DIALOG)
        await page.tab_to("Redrive with other values")
        await page.press("Enter")
        await page.until("document.querySelector('dialog[open] textarea')")
        await page.js("document.querySelector('dialog[open] textarea').select()")
        await page.write('{"large": 9007199254740993}')
        await page.tab_to("Redrive")
        await page.press("Enter")
        await page.until(f"{LETTERS} === 1")

        await page.tab_to("redrive-all")
        await page.press("Enter")
        await page.until(DIALOG)
        await page.tab_to("Redrive")
        await page.press("Enter")
        await page.until(f"{LETTERS} === 0")
    assert desk.decided == [
        ("redrive", 1, None, "service_role"),
        ("discard", 2, "service_role"),
        ("redrive", 3, {"large": 9007199254740993}, "service_role"),
        ("redrive", 4, None, "service_role"),
    ]


@in_a_browser
async def test_handlers_and_lane_keys_are_paused_by_keyboard(page: Page) -> None:
    desk, told = Remembering(), Told(3)
    first = "shop.handlers.totals0"
    async with dashboard(told, desk, every_seconds=0.1) as served:
        await page.goto(served.url)
        await sign_in(page)
        await page.until("!document.querySelector('#letters').hidden")
        for lane_key in ("", "42"):
            await page.tab_to(f"Pause {first}")
            await page.press("Enter")
            await page.until(DIALOG)
            await page.write(lane_key)
            await page.press("Enter")
            await page.until(f"!{DIALOG}")
        await page.tab_to(f"Resume a lane key of {first}")
        await page.press("Enter")
        await page.until("document.querySelector('#paused').hidden")
        told.handlers[first]["paused"] = True
        await page.until(f"document.querySelector('[aria-label=\"Resume {first}\"]')")
        await page.tab_to(f"Resume {first}")
        await page.press("Enter")
        await page.until("document.querySelector('#said').innerText.endsWith('totals0 goes on')")
    assert desk.decided == [
        ("pause", first, None),
        ("pause", first, "42"),
        ("resume", first, "42"),
        ("resume", first, None),
    ]


@in_a_browser
async def test_backfills_are_started_stopped_and_resumed_by_keyboard(page: Page) -> None:
    desk = Remembering()
    async with dashboard(Told(3), desk, every_seconds=0.1) as served:
        await page.goto(served.url)
        await sign_in(page)
        await page.until("!document.querySelector('#letters').hidden")
        await page.tab_to("new-backfill")
        await page.press("Enter")
        await page.until(DIALOG)
        await page.press("ArrowDown")
        await page.press("ArrowDown")
        await page.tab_to("INPUT")
        await page.write("500")
        await page.press("Enter")
        await page.until(f"!{DIALOG}")
        cancel = "Cancel the backfill of public.orders2 for shop.handlers.totals0"
        await page.until(f"document.querySelector('[aria-label=\"{cancel}\"]')")
        await page.tab_to(cancel)
        await page.press("Enter")
        resume = cancel.replace("Cancel", "Resume")
        await page.until(f"document.querySelector('[aria-label=\"{resume}\"]').offsetParent")
        await page.tab_to(resume)
        await page.press("Enter")
        await page.until(DIALOG)
        await page.press("Enter")
        await page.until(f"!{DIALOG}")
        # Of a table that only a change handler follows, that one is named.
        await page.tab_to("new-backfill")
        await page.press("Enter")
        await page.until(DIALOG)
        await page.press("ArrowDown")
        await page.tab_to("INPUT")
        await page.press("Enter")
        await page.until(f"!{DIALOG}")
    assert desk.decided == [
        ("backfill", "public.orders2", None, 500),
        ("cancel", 1),
        ("go on", 1, None),
        ("backfill", "public.orders1", "shop.handlers.totals1", None),
    ]


@in_a_browser
async def test_a_refusal_is_told_where_it_was_asked(page: Page) -> None:
    desk = Remembering(1)
    async with dashboard(Told(1), desk, every_seconds=3_600) as served:
        await page.goto(served.url)
        await sign_in(page)
        await page.until(f"{LETTERS} === 1")
        desk.dead.clear()  # somebody else was quicker
        await page.tab_to("Redrive 1")
        await page.press("Enter")
        await page.until("document.querySelector('#said').innerText === 'there is no dead letter 1'")
    page.complaints[:] = [one for one in page.complaints if "404" not in one]


@in_a_browser
@pytest.mark.parametrize(
    ("width", "dark"), [(390, True), (768, False), (1280, True)], ids=["phone", "tablet", "desktop"]
)
async def test_fifty_handlers_are_read_on_any_screen(page: Page, width: int, dark: bool) -> None:  # noqa: FBT001
    told, desk = Told(50), Remembering(5)
    desk.fill(1, "public.orders0", "shop.handlers.totals0")
    async with dashboard(told, desk, every_seconds=0.5) as served:
        await page.look(width, 844, dark=dark)
        await page.goto(served.url)
        await sign_in(page)
        await page.until(f"{ROWS} === 50 && {LETTERS} === 5")
        # Nothing has to be moved sideways, but at most a table within itself.
        assert await page.js("document.documentElement.scrollWidth <= innerWidth")
        assert await page.js(CONTRAST) == []
        if width == 390:
            small = (
                "[...document.querySelectorAll('button, input, select')].filter((one) => one.offsetParent)"
            )
            assert await page.js(f"Math.min(...{small}.map((one) => one.offsetHeight))") >= 36
        # Focus and its ring outlive every update.
        await page.tab_to("Pause shop.handlers.totals6")
        asked = told.asked
        told.handlers["shop.handlers.totals6"]["queued"] = 4321
        await page.until("document.querySelector('#handlers').innerText.includes('4,321')")
        assert told.asked > asked
        assert await page.focused() == "Pause shop.handlers.totals6"
        assert await page.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await page.js("document.querySelector('#only').focus()")
        await page.write("totals4")
        await page.until(f"{ROWS} === 11")
        assert await page.text("#count") == "11 of 50"
        order = "[...document.querySelectorAll('#handlers tbody th')].map((one) => one.innerText)"
        await page.js(f"{ORDER}.value = 'lag', {ORDER}.dispatchEvent(new Event('change'))")
        assert (await page.js(order))[:2] == ["shop.handlers.totals49", "shop.handlers.totals48"]


ORDER = "document.querySelector('#order')"
# Text against what is behind it, as WCAG 2 counts it: 4.5 to 1 at least.
CONTRAST = r"""(() => {
  const part = (c) => { c /= 255; return c <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => .2126 * part(r) + .7152 * part(g) + .0722 * part(b);
  const read = (text) => text.match(/[\d.]+/g).map(Number);
  const behind = (one) => {
    for (; one; one = one.parentElement) {
      const colour = read(getComputedStyle(one).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const bad = new Set();
  for (const one of document.querySelectorAll("body *")) {
    const words = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!one.offsetParent || !words) continue;
    const both = [light(read(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
    if ((both[0] + .05) / (both[1] + .05) < 4.5) bad.add(one.tagName + " " + one.innerText.slice(0, 30));
  }
  return [...bad];
})()"""
