"""The HTTP of health, asked over a real socket."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from worker.errors import ConfigurationError
from worker.web import health_app, serve


class Told:
    """A process that says what it is told to say."""

    def __init__(self) -> None:
        self.liveness: tuple[bool, list[str]] = (True, [])
        self.readiness: tuple[bool, list[str]] | None = (True, [])
        self.never = asyncio.Event()
        self.broken = False

    def live(self) -> tuple[bool, list[str]]:
        return self.liveness

    async def ready(self) -> tuple[bool, list[str]]:
        while self.readiness is None:
            await self.never.wait()
        return self.readiness

    async def serves(self) -> tuple[bool, list[str]]:
        return True, []

    def notes(self) -> list[str]:
        return ["it is told"]

    async def status(self) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError("password=hunter2 is in this text")
        return {"ready": True, "handlers": {}}


@asynccontextmanager
async def asked(told: Told, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with (
        serve(health_app(told, **options), "127.0.0.1", 0) as served,
        httpx.AsyncClient(base_url=served.url, trust_env=False) as client,
    ):
        yield client


async def test_a_live_and_ready_process_answers_200() -> None:
    async with asked(Told()) as client:
        live, ready = await client.get("/livez"), await client.get("/readyz")
    assert (live.status_code, live.json()) == (200, {"live": True, "reasons": []})
    assert (ready.status_code, ready.json()) == (200, {"ready": True, "reasons": [], "notes": ["it is told"]})
    assert ready.headers["cache-control"] == "no-store"


async def test_what_is_wrong_is_503_with_every_reason() -> None:
    told = Told()
    told.liveness = (False, ["the listener's loop stands"])
    told.readiness = (False, ["Redis cannot be reached", "no subscription"])
    async with asked(told) as client:
        live, ready = await client.get("/livez"), await client.get("/readyz")
    assert (live.status_code, live.json()["reasons"]) == (503, ["the listener's loop stands"])
    assert (ready.status_code, ready.json()) == (
        503,
        {
            "ready": False,
            "reasons": ["Redis cannot be reached", "no subscription"],
            "notes": ["it is told"],
        },
    )


async def test_who_lets_a_stand_by_count_is_told_so() -> None:
    told = Told()
    told.readiness = (False, ["standing by"])
    async with asked(told) as client:
        answers = [await client.get(path) for path in ("/readyz", "/readyz?standby=ok", "/readyz?standby=no")]
    assert [answer.status_code for answer in answers] == [503, 200, 503]


async def test_readiness_that_hangs_is_answered_in_time() -> None:
    told = Told()
    told.readiness = None
    async with asked(told, answer_seconds=0.05) as client:
        response = await client.get("/readyz")
    assert response.status_code == 503
    assert "no answer within 0.05 s" in response.json()["reasons"][0]


async def test_a_state_that_cannot_be_told_names_the_error_and_no_text_of_it() -> None:
    told = Told()
    told.broken = True
    async with asked(told) as client:
        response = await client.get("/status")
    assert response.status_code == 503
    assert "RuntimeError" in response.text
    assert "hunter2" not in response.text


async def test_the_state_and_unknown_paths_are_json() -> None:
    async with asked(Told()) as client:
        status, nowhere, wrong = (
            await client.get("/status"),
            await client.get("/nowhere"),
            await client.post("/livez"),
        )
    assert status.json() == {"ready": True, "handlers": {}}
    assert (nowhere.status_code, nowhere.json()) == (404, {"error": "Not Found"})
    assert wrong.status_code == 405
    assert "GET" in wrong.headers["allow"]


async def test_further_routes_stand_beside_those_of_health() -> None:
    route = Route("/metrics", lambda _request: PlainTextResponse("tailrace_up 1\n"))
    async with asked(Told(), routes=[route]) as client:
        assert (await client.get("/metrics")).text == "tailrace_up 1\n"
        assert (await client.get("/livez")).status_code == 200


async def test_a_port_that_is_taken_is_one_clear_problem() -> None:
    app = health_app(Told())
    async with serve(app, "127.0.0.1", 0) as served:
        with pytest.raises(ConfigurationError) as caught:
            async with serve(app, "127.0.0.1", served.port, setting="WORKER_HEALTH_PORT"):
                pass
    (problem,) = caught.value.problems
    assert problem.startswith(f"WORKER_HEALTH_PORT {served.port} is taken on 127.0.0.1: ")


async def test_an_address_of_another_machine_is_one_clear_problem() -> None:
    with pytest.raises(ConfigurationError, match=r"HEALTH_HOST 192\.0\.2\.1 is no address of this machine"):
        async with serve(health_app(Told()), "192.0.2.1", 0):
            pass


async def test_the_port_is_free_again_and_no_task_is_left() -> None:
    before = asyncio.all_tasks()
    async with serve(health_app(Told()), "127.0.0.1", 0) as served:
        pass
    assert asyncio.all_tasks() == before
    async with serve(health_app(Told()), "127.0.0.1", served.port) as again:
        assert again.port == served.port


async def test_an_error_of_the_body_comes_out_as_it_is() -> None:
    with pytest.raises(LookupError, match="ours"):
        async with serve(health_app(Told()), "127.0.0.1", 0):
            raise LookupError("ours")


async def test_signals_stay_with_the_process() -> None:
    caught = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, caught.set)
    try:
        async with asked(Told()) as client:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(caught.wait(), 10)
            assert (await client.get("/livez")).status_code == 200
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_a_server_that_ends_by_itself_ends_the_body_too() -> None:
    async def body() -> None:
        async with serve(health_app(Told()), "127.0.0.1", 0):
            # The only server of this loop: ended from outside, as a defect in it would.
            (task,) = [task for task in asyncio.all_tasks() if task.get_name() == "http:port"]
            task.cancel()
            await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="HTTP server ended by itself"):
        await body()
    async with asked(Told()) as client:  # mostly on a socket of the same number
        assert (await client.get("/livez")).status_code == 200
