"""`POST /hooks/changes`: takes Supabase's database webhooks, from whoever knows the secret.

Answers 200 once the webhook is written down. Every other answer means that the change is lost, for its sender
does not try again: so each says in one line what to do.
"""

import hmac
from collections.abc import Awaitable, Callable

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from worker.errors import MalformedChange
from worker.hooks import MOST_BYTES, InboxFullError, read_hook
from worker.web.health import Json

log = structlog.get_logger(__name__)

PATH = "/hooks/changes"


def hook_route(secret: str, put: Callable[[bytes], Awaitable[None]]) -> Route:
    """Return the route.

    Args:
        secret: what the header `Authorization: Bearer …` must have.
        put: writes a webhook down, as `Inbox.put` does.
    """
    expected = f"Bearer {secret}".encode()

    async def change(request: Request) -> Response:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, expected):
            return _refuse(401, "the header Authorization must be: Bearer and WORKER_HOOK_SECRET")
        body = await _body(request)
        if body is None:
            return _refuse(413, f"a webhook of more than {MOST_BYTES} bytes")
        try:
            read_hook(body)
            await put(body)
        except MalformedChange as error:
            return _refuse(400, str(error))
        except InboxFullError:
            return _refuse(503, "too many webhooks wait: is there a listener, and are there workers?")
        except Exception as error:  # noqa: BLE001 - Redis is away, in one of many ways
            return _refuse(503, f"Redis cannot be written ({type(error).__name__})")
        return Json({"accepted": True})

    return Route(PATH, change, methods=["POST"])


async def _body(request: Request) -> bytes | None:
    """Read the body; None where it is too large."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            return None
    return bytes(body)


def _refuse(code: int, reason: str) -> Response:
    # Lost with this answer. No value of the row is in the reason.
    log.warning("webhook refused", code=code, reason=reason)
    headers = {"WWW-Authenticate": "Bearer"} if code == 401 else None  # noqa: PLR2004 - the one code that demands it
    return Json({"error": reason}, code, headers=headers)
