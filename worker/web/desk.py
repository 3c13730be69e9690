"""The routes for operators: what is held or dead, lanes and backfills, for whoever has the right.

Translates requests into calls of a `Desk`, and what it says into JSON; it decides nothing, and knows no
database. Values of rows are in the answers, never in the log.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Protocol

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from worker.asked import Operator, Which, which
from worker.database import explain, is_away
from worker.errors import Refused, Unknown
from worker.web.bearer import Bearer
from worker.web.health import Json
from worker.web.origins import refuse_strangers

log = structlog.get_logger(__name__)

BODY_BYTES = 1024 * 1024
PAGE, MOST = 100, 1_000
AT_ONCE = 2
"""Requests that are worked on: the listener's connections are for its reading."""
_FILTERS = ("handler", "table", "error_class", "since", "until")
_decode = msgspec.json.Decoder(dict[str, Any], float_hook=Decimal).decode


class Desk(Protocol):
    """What operators may do; see worker/operating.py."""

    async def find(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List dead letters."""
        ...

    async def show(self, id_: int) -> dict[str, Any]:
        """Tell all about one."""
        ...

    async def held(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List what has failed and will be retried."""
        ...

    async def show_held(self, id_: int) -> dict[str, Any]:
        """Tell all about one."""
        ...

    async def lanes(self, handler: str | None = None) -> list[dict[str, Any]]:
        """Tell of each handler what is paused, and what waits."""
        ...

    async def redrive(
        self, operator: Operator, id_: int, record: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Have one tried again."""
        ...

    async def discard(self, operator: Operator, id_: int) -> dict[str, Any]:
        """Forget one."""
        ...

    async def pause(
        self, operator: Operator, handler: str, lane_key: str | None = None, *, paused: bool
    ) -> dict[str, Any]:
        """Pause a handler or a lane key of it, or let it go on."""
        ...

    async def backfill(
        self, operator: Operator, table: str, *, handler: str | None = None, rate: int | None = None
    ) -> list[dict[str, Any]]:
        """Have the rows of a table given to derive handlers."""
        ...

    async def backfills(self, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """List backfills."""
        ...

    async def cancel_backfill(self, id_: int) -> dict[str, Any]:
        """Have one stop."""
        ...

    async def resume_backfill(self, id_: int, rate: int | None = None) -> dict[str, Any]:
        """Have one go on, perhaps at another rate."""
        ...


Step = Callable[[Desk, Operator, Request], Awaitable[dict[str, Any]]]


class Find(Protocol):
    """What lists changes that have failed, in the order of their ids."""

    async def __call__(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List them; above an id, at most so many."""
        ...


def desk_routes(bearer: Bearer, desk: Callable[[], Desk | None]) -> list[BaseRoute]:
    """Return the routes.

    Args:
        bearer: tells who may.
        desk: gives the desk, None while the process is starting.
    """
    places = asyncio.Semaphore(AT_ONCE)

    def route(method: str, path: str, step: Step) -> Route:
        async def answer(request: Request) -> Response:
            if method != "GET":
                refuse_strangers(request)
            identity = await bearer(request)
            open_desk = desk()
            if open_desk is None:
                raise HTTPException(503, "starting: try again")
            operator = Operator(identity.subject or identity.role, "http")
            async with places:
                told = await _told(step(open_desk, operator, request))
            return Json(told, headers={"Cache-Control": "no-store"})

        return Route(path, answer, methods=[method])

    return [
        route("GET", "/operator", _who),
        route("GET", "/dead-letters", _list),
        route("GET", "/dead-letters/{id:int}", _show),
        route("POST", "/dead-letters/{id:int}/redrive", _redrive),
        route("POST", "/dead-letters/{id:int}/discard", _discard),
        route("GET", "/held", _list_held),
        route("GET", "/held/{id:int}", _show_held),
        route("GET", "/lanes", _lanes),
        route("POST", "/lanes/{handler}/pause", _pause),
        route("POST", "/lanes/{handler}/resume", _resume),
        route("GET", "/backfills", _backfills),
        route("POST", "/backfills", _backfill),
        route("POST", "/backfills/{id:int}/cancel", _cancel),
        route("POST", "/backfills/{id:int}/resume", _go_on),
    ]


async def _told(step: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    try:
        return await step
    except Unknown as error:
        raise HTTPException(404, str(error)) from None
    except Refused as error:
        raise HTTPException(409, str(error)) from None
    except HTTPException:
        raise
    except Exception as error:
        if not is_away(error):
            raise
        raise HTTPException(503, explain(error)) from None


async def _who(_desk: Desk, operator: Operator, _request: Request) -> dict[str, Any]:
    return {"name": operator.name}


async def _list(desk: Desk, _: Operator, request: Request) -> dict[str, Any]:
    return await _page("dead_letters", desk.find, request)


async def _list_held(desk: Desk, _: Operator, request: Request) -> dict[str, Any]:
    return await _page("held", desk.held, request)


async def _page(name: str, find: Find, request: Request) -> dict[str, Any]:
    given = dict(request.query_params)
    if strange := sorted(given.keys() - {*_FILTERS, "limit", "after"}):
        raise HTTPException(
            400, f"unknown parameter {strange[0]}; there are {', '.join(_FILTERS)}, limit, after"
        )
    try:
        meant = which((), **{name: given[name] for name in _FILTERS if name in given})
    except Refused as error:
        raise HTTPException(400, str(error)) from None
    limit = _number(given, "limit", PAGE, 1, MOST)
    after = _number(given, "after", None, -(2**63), 2**63 - 1)
    found = await find(meant, after=after, most=(limit or PAGE) + 1)
    page = found[:limit]
    return {name: page, "next": page[-1]["id"] if len(found) > len(page) else None}


async def _show(desk: Desk, _: Operator, request: Request) -> dict[str, Any]:
    return await desk.show(request.path_params["id"])


async def _show_held(desk: Desk, _: Operator, request: Request) -> dict[str, Any]:
    return await desk.show_held(request.path_params["id"])


async def _lanes(desk: Desk, _: Operator, _request: Request) -> dict[str, Any]:
    return {"lanes": await desk.lanes()}


async def _redrive(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    id_ = request.path_params["id"]
    record = (await _body(request, "record")).get("record")
    if record is not None and not isinstance(record, dict):
        raise HTTPException(400, "record must be an object of columns and values")
    told = await desk.redrive(operator, id_, record)
    _note(operator, "redrive", told)
    return told


async def _discard(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    await _body(request)
    told = await desk.discard(operator, request.path_params["id"])
    _note(operator, "discard", told)
    return told


async def _pause(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    return await _set(desk, operator, request, paused=True)


async def _resume(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    return await _set(desk, operator, request, paused=False)


async def _set(desk: Desk, operator: Operator, request: Request, *, paused: bool) -> dict[str, Any]:
    key = (await _body(request, "lane_key")).get("lane_key")
    if isinstance(key, list):
        key = msgspec.json.encode(key).decode()
    elif key is not None:
        key = str(key)
    told = await desk.pause(operator, request.path_params["handler"], key, paused=paused)
    _note(operator, "pause" if paused else "resume", told)
    return told


async def _backfills(desk: Desk, _: Operator, _request: Request) -> dict[str, Any]:
    return {"backfills": await desk.backfills()}


async def _backfill(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    # Without a condition: that would be SQL from whoever has a token.
    body = await _body(request, "table", "handler", "rate")
    table, handler = body.get("table"), body.get("handler")
    if not isinstance(table, str) or not isinstance(handler, str | None):
        raise HTTPException(400, "table must be a name, and handler one or nothing")
    made = await desk.backfill(operator, table, handler=handler, rate=_rate(body))
    for one in made:
        _note(operator, "backfill", one | {"id": None})
    return {"backfills": made}


def _rate(body: Mapping[str, Any]) -> int | None:
    rate = body.get("rate")
    if rate is not None and (type(rate) is not int or rate not in range(1, 2**31)):
        raise HTTPException(400, "rate must be rows a second, a whole number above 0")
    return rate


async def _cancel(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    await _body(request)
    told = await desk.cancel_backfill(request.path_params["id"])
    _note(operator, "cancel a backfill", told | {"id": None})
    return told


async def _go_on(desk: Desk, operator: Operator, request: Request) -> dict[str, Any]:
    rate = _rate(await _body(request, "rate"))
    told = await desk.resume_backfill(request.path_params["id"], rate)
    _note(operator, "resume a backfill", told | {"id": None})
    return told


def _note(operator: Operator, action: str, told: Mapping[str, Any]) -> None:
    log.info(
        "an operator has decided",
        action=action,
        handler=told["handler"],
        dead_letter=told.get("id"),
        by=operator.name,
    )


async def _body(request: Request, *names: str) -> dict[str, Any]:
    """Read the body: nothing, or a JSON object with these names at most."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > BODY_BYTES:
            raise HTTPException(413, f"the body is longer than {BODY_BYTES} bytes")
    if not body.strip():
        return {}
    try:
        told = _decode(body)
    except msgspec.MsgspecError:
        raise HTTPException(400, "the body must be a JSON object, or empty") from None
    if strange := sorted(told.keys() - set(names)):
        known = f"there is {names[0]}" if names else "it must be empty"
        raise HTTPException(400, f"unknown in the body: {strange[0]}; {known}")
    return told


def _number(given: Mapping[str, str], name: str, default: int | None, least: int, most: int) -> int | None:
    if name not in given:
        return default
    try:
        number = int(given[name])
    except ValueError:
        number = least - 1
    if not least <= number <= most:
        raise HTTPException(400, f"{name} must be a whole number from {least} to {most}")
    return number
