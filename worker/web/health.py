"""`/livez`, `/readyz` and `/status` of a process, over whatever can tell its state.

Translates state into HTTP and nothing more: it decides nothing about health, opens no connection, and serves
no page. An answer always comes, in bounded time, and is JSON: a probe that hangs or shows a traceback tells
nobody anything.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol, TypeVar

import orjson
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

log = structlog.get_logger(__name__)

# Kubernetes and most load balancers give up after a few seconds at most; an answer with a reason is better.
_ANSWER_SECONDS = 5.0
_OK = 200
_UNAVAILABLE = 503

_T = TypeVar("_T")


class StatusProvider(Protocol):
    """What a process can tell of itself."""

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether the process works at all, and if not, why; without I/O. No means: restart it."""
        ...

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell whether the process can do its work now, and if not, each reason with its remedy."""
        ...

    async def serves(self) -> tuple[bool, list[str]]:
        """Tell whether the process does its part: as `ready`, but to stand by for another is a part, too."""
        ...

    def notes(self) -> list[str]:
        """Tell what a person should know though it is no reason to be unready; without I/O."""
        ...

    async def status(self) -> dict[str, Any]:
        """Return the full state, as `/status` shows it; values that JSON knows."""
        ...


class Json(Response):
    """JSON of whatever can be shown as such."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Write it."""
        return orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS) + b"\n"


def health_app(
    status: StatusProvider, routes: list[BaseRoute] | None = None, *, answer_seconds: float = _ANSWER_SECONDS
) -> Starlette:
    """Return the application.

    Args:
        status: the process.
        routes: further routes; those of health go first.
        answer_seconds: after so long without an answer of `ready` or `status` the answer is 503.
    """

    async def livez(_request: Request) -> Response:
        live, reasons = status.live()
        return _answer({"live": live, "reasons": reasons}, good=live)

    async def readyz(request: Request) -> Response:
        # A platform that replaces processes one by one waits for the new one, which stands by for the old.
        ask = status.serves if request.query_params.get("standby") == "ok" else status.ready
        told = await in_time(ask(), answer_seconds)
        ready, reasons = (False, [told]) if isinstance(told, str) else told
        return _answer({"ready": ready, "reasons": reasons, "notes": status.notes()}, good=ready)

    async def state(_request: Request) -> Response:
        told = await in_time(status.status(), answer_seconds)
        if isinstance(told, str):
            return _answer({"reasons": [told]}, good=False)
        return _answer(told, good=True)

    return Starlette(
        routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/status", state), *(routes or [])],
        exception_handlers={HTTPException: _refuse, Exception: _fail},
    )


async def in_time(answer: Awaitable[_T], seconds: float) -> _T | str:
    """Await an answer; where it fails or takes too long, return the reason in words instead."""
    try:
        async with asyncio.timeout(seconds):
            return await answer
    except TimeoutError:
        return f"no answer within {seconds:g} s: see the log"
    except Exception as error:  # a probe must be answered whatever is broken
        log.warning("the state could not be told", error=type(error).__name__, exc_info=True)
        return f"the state could not be told ({type(error).__name__}): see the log"


def _answer(content: object, *, good: bool) -> Response:
    return Json(content, _OK if good else _UNAVAILABLE, headers={"Cache-Control": "no-store"})


async def _refuse(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    return Json({"error": error.detail}, error.status_code, headers=dict(error.headers or {}))


async def _fail(_request: Request, error: Exception) -> Response:
    return Json({"error": f"internal error ({type(error).__name__}): see the log"}, 500)
