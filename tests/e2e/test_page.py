"""The page of a real listener: it follows the state, and does not hold up the end of the process."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.e2e import shop as handlers
from tests.e2e.test_proven import PROVEN, drop_slot, ready
from tests.stack import Project, Servers, project


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
