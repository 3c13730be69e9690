"""The HTTP side of the websocket: which upgrade is accepted, and the exact words in which it is refused."""

import http
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from standin.server import tokens
from standin.server.behaviour import Behaviour
from standin.server.frames import Version

SERVER = "Cowboy"
GATEWAY_PATH = "/realtime/v1/websocket"
BARE_PATH = "/socket/websocket"
CACHE_CONTROL = "max-age=0, private, must-revalidate"
_DAY = 24 * 3600
_FAULT_TEXTS = {
    401: "Token has expired",
    403: "Realtime is disabled for this tenant",
    404: "Tenant not found",
    429: "Too many connected users",
    500: "Internal server error",
    503: "Service unavailable",
}


@dataclass(frozen=True, slots=True)
class Accepted:
    """A client that may upgrade: its frame version, its token and the token's claims."""

    version: Version
    token: str
    claims: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal; `late` where the real server waits before it answers."""

    status: int
    body: bytes
    content_type: str | None
    late: bool = True

    def response(self) -> Response:
        """The HTTP response, with the real server's headers."""
        headers = Headers(
            [
                ("cache-control", CACHE_CONTROL),
                ("connection", "close"),
                ("content-length", str(len(self.body))),
                ("date", formatdate(usegmt=True)),
            ]
        )
        if self.content_type is not None:
            headers["content-type"] = self.content_type
        return Response(self.status, http.HTTPStatus(self.status).phrase, headers, self.body)


def refused(status: int, error: str) -> Refused:
    """A refusal with the real server's JSON body."""
    return Refused(status, orjson.dumps({"error": error}), "application/json; charset=utf-8")


def fault_refusal(status: int) -> Refused:
    """The refusal that the fault switch `refuse_connections` asks for."""
    return refused(status, _FAULT_TEXTS[status])


def judge(request: Request, secret: str, behaviour: Behaviour) -> Accepted | Refused:
    """Whether a client may upgrade, by path, version and key."""
    parts = urlsplit(request.path)
    if parts.path not in (GATEWAY_PATH, BARE_PATH):
        return Refused(404, b"Not Found", "text/html; charset=utf-8", late=False)
    query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
    version = _version(query)
    if version is None:
        return Refused(403, b"", None, late=False)
    token = query.get("apikey") or request.headers.get("x-api-key")
    if not token:
        return refused(401, "API key is missing")
    if token.startswith("sb_") and parts.path == GATEWAY_PATH:
        return _through_gateway(version, token, behaviour)
    try:
        return Accepted(version, token, tokens.verify(token, secret))
    except tokens.TokenError as error:
        return refused(401, error.text)


def _through_gateway(version: Version, key: str, behaviour: Behaviour) -> Accepted | Refused:
    # Only the gateway in front of the hosted server knows these keys; it hands on a token instead.
    role = tokens.gateway_role(key, behaviour.api_keys)
    if role is None:
        return refused(401, "Invalid API key")
    return Accepted(version, key, {"role": role, "exp": int(time.time()) + _DAY})


def _version(query: Mapping[str, str]) -> Version | None:
    wanted = query.get("vsn", "1.0.0")
    if wanted.startswith("1.0."):
        return 1
    return 2 if wanted.startswith("2.0.") else None
