from collections.abc import AsyncIterator

import httpx
import pytest

from standin.server.admin import AdminServer
from tests.integration.standin_server.driving import Running


@pytest.fixture
async def admin(server: Running) -> AsyncIterator[httpx.AsyncClient]:
    serving = AdminServer(server.realtime)
    await serving.start("127.0.0.1")
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{serving.port}", trust_env=False) as client:
        yield client
    await serving.stop()


async def test_switches_are_set_shown_and_cleared(server: Running, admin: httpx.AsyncClient) -> None:
    answer = await admin.post("/faults", json={"drop": 0.25, "silent": "current"})
    assert answer.status_code == 200
    assert answer.json()["faults"]["drop"] == 0.25
    assert server.faults.silent == "current"
    shown = (await admin.get("/faults")).json()
    assert shown["faults"]["drop"] == 0.25
    assert shown["counters"]["joins"] == 0
    cleared = (await admin.delete("/faults")).json()
    assert not any(cleared["faults"].values())


@pytest.mark.parametrize("wrong", [{"drops": 1}, {"drop": "much"}, {"drop": 0.5, "close": 7}, [1]])
async def test_wrong_requests_change_nothing_and_say_why(
    server: Running, admin: httpx.AsyncClient, wrong: object
) -> None:
    answer = await admin.post("/faults", json=wrong)
    assert answer.status_code == 422
    assert answer.json()["error"]
    assert server.faults.drop == 0.0


async def test_what_is_no_json_is_refused(admin: httpx.AsyncClient) -> None:
    answer = await admin.post("/faults", content=b"drop=1")
    assert (answer.status_code, "no JSON" in answer.json()["error"]) == (422, True)


async def test_closing_over_http(server: Running, admin: httpx.AsyncClient) -> None:
    async with server.client() as client:
        await client.subscribe()
        assert (await admin.post("/faults", json={"close": 1012})).status_code == 200
        assert await client.closed() == 1012
