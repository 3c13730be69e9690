"""The page on `/` and its events, over a real socket; its script in Node, on a document that takes text."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from tests.unit.test_telemetry import state
from worker.web import page_routes, serve

HOSTILE = "<img src=x onerror=alert(1)>\n\ndata: {}"

# Elements that take text and children, and fail for whatever would read HTML.
DOCUMENT = """
class Node {
  children = []; text = null; attributes = {}; value = "";
  constructor(tag) { this.tag = tag; }
  append(...ones) { this.children.push(...ones); }
  replaceChildren(...ones) { this.children = ones; }
  set textContent(text) { this.text = text; this.children = []; }
  set innerHTML(_) { throw new Error("innerHTML"); }
  set outerHTML(_) { throw new Error("outerHTML"); }
  setAttribute(name, value) { this.attributes[name] = String(value); }
  addEventListener() {}
  all() { return [this, ...this.children.flatMap((one) => one.all())]; }
}
const byId = {};
globalThis.Node = Node;
globalThis.document = {
  getElementById: (id) => byId[id] ??= new Node("#" + id),
  createElement: (tag) => new Node(tag),
  createElementNS: (_, tag) => new Node(tag),
};
globalThis.EventSource = class { constructor(url) { globalThis.events_of = this; this.url = url; } };
"""


class Told:
    """A process that tells its state, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.broken = False

    async def status(self) -> dict[str, Any]:
        self.asked += 1
        if self.broken:
            raise RuntimeError("password=hunter2 is in this text")
        return state(
            ready=True, reasons=[], gaps=[{"cause": HOSTILE, "tables": [], "since": None, "until": None}]
        )


@asynccontextmanager
async def looked_at(told: Told, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    closing = asyncio.Event()
    app = Starlette(routes=page_routes(told.status, closing, **options))
    async with (
        httpx.AsyncClient(trust_env=False) as client,
        serve(app, "127.0.0.1", 0, closing=closing) as served,
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
    assert "frame-ancestors 'none'" in policy
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    assert not re.search(r"\bsrc=|href=|@import|url\(|\bon\w+=\"|style=", page.text)
    assert set(re.findall(r"https?://[^\"\s]+", page.text)) == {"http://www.w3.org/2000/svg"}


async def test_events_are_the_state_one_after_the_other() -> None:
    told = Told()
    async with looked_at(told, every_seconds=0.01) as client, client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        first, second = await events(answer.aiter_lines(), 2)
    assert first == second
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


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
async def test_the_script_puts_everything_in_as_text() -> None:
    async with looked_at(Told()) as client:
        page = (await client.get("/")).text
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    told = await Told().status()
    told["handlers"] = {HOSTILE: told["handlers"]["totals"]} | {
        f"handler{n}": state()["handlers"]["totals"] for n in range(50)
    }
    run = f"""
    {DOCUMENT}
    {script}
    const told = {json.dumps(told)};
    for (let n = 0; n < 3; n += 1) events_of.onmessage({{ data: JSON.stringify(told) }});
    const shown = Object.values(byId).flatMap((one) => one.all());
    console.log(JSON.stringify({{
      url: events_of.url,
      tags: [...new Set(shown.map((one) => one.tag))],
      texts: shown.map((one) => one.text),
      rows: byId.handlers.all().filter((one) => one.tag === "tr").length,
    }}));
    """
    done = await asyncio.to_thread(
        subprocess.run, ["node", "-"], input=run, capture_output=True, text=True, check=True, timeout=60
    )
    shown = json.loads(done.stdout)
    assert shown["url"] == "events"
    assert shown["rows"] == 52
    assert shown["texts"].count(HOSTILE) == 2
    assert {"ready", "20", "extended"} <= set(shown["texts"])
    assert not {"img", "script"} & set(shown["tags"])
