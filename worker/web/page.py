"""`/`: one page that shows what `/status` says, live, and asks desk.py for what needs a token.

What is served here has no row in it and decides nothing. The token is in the browser's tab alone, and is sent
as a header. All that the page shows is put in as text; its policy allows no other script, style or connection
than its own, and no script that would write HTML.
"""

import asyncio
import base64
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from typing import Any, Literal

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from worker.web.health import in_time
from worker.web.kept import Kept
from worker.web.origins import asks_this_machine

EVERY_SECONDS = 2.0
MOST_VIEWERS = 20
"""Each is an open connection; reading the state is shared by all of them."""
_ANSWER_SECONDS = 5.0

Shown = Literal["local", "everywhere", "off"]
"""`local`: to who asks by this machine's loopback address, under a name of it."""


def page_routes(
    status: Callable[[], Awaitable[dict[str, Any]]],
    closing: asyncio.Event,
    *,
    shown: Shown = "local",
    every_seconds: float = EVERY_SECONDS,
    most_viewers: int = MOST_VIEWERS,
) -> list[BaseRoute]:
    """Return the routes of the page and of its events.

    Args:
        status: reads the state, as `/status` shows it.
        closing: is set when the process ends: a stream would hold it up.
        shown: to whom.
        every_seconds: between two events.
        most_viewers: at the same time; a further one is answered 503.
    """
    if shown == "off":
        return []
    text = files("worker.web").joinpath("page.html").read_text("utf-8")
    headers = {
        "Content-Security-Policy": _policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # for what does not know frame-ancestors
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    kept = Kept(status, every_seconds / 2)
    viewers = 0

    def check(request: Request) -> None:
        if shown == "local" and not asks_this_machine(request):
            raise HTTPException(
                403,
                "the dashboard is shown on loopback only: ask for http://localhost by a tunnel,"
                " or set WORKER_DASHBOARD=everywhere",
            )

    async def page(request: Request) -> Response:
        check(request)
        return Response(text, media_type="text/html", headers=headers)

    async def stream() -> AsyncIterator[bytes]:
        nonlocal viewers
        viewers += 1
        try:
            yield b"retry: 2000\n\n"
            while not closing.is_set():
                yield _event(await in_time(kept.get(), _ANSWER_SECONDS))
                await _pause(closing, every_seconds)
        finally:
            viewers -= 1

    async def events(request: Request) -> Response:
        check(request)
        if viewers >= most_viewers:
            return PlainTextResponse("too many look at this page already\n", 503)
        headers = {
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # nginx would keep events back until it has a page of them
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        return StreamingResponse(stream(), media_type="text/event-stream", headers=headers)

    return [Route("/", page), Route("/events", events)]


def _event(told: dict[str, Any] | str) -> bytes:
    """Write an event; JSON of orjson has no line breaks, which would end it."""
    state = {"ready": False, "reasons": [told]} if isinstance(told, str) else told
    return b"data: " + orjson.dumps(state, default=str, option=orjson.OPT_NON_STR_KEYS) + b"\n\n"


async def _pause(closing: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await closing.wait()
    except TimeoutError:
        return


def _policy(text: str) -> str:
    """Allow the page's own script and style by their hashes, its own events, and nothing else."""

    def own(tag: str) -> str:
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in inside)
        return " ".join(f"'sha256-{one}'" for one in hashes)

    return (
        f"default-src 'none'; script-src {own('script')}; style-src {own('style')}; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )
