"""The admin HTTP: fault switches and counters, on a port of its own, in the server's event loop.

It decides nothing; it reads, checks and hands on.
"""

import asyncio
import contextlib
import socket
from collections.abc import Generator

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from standin.server import faults
from standin.server.realtime import RealtimeServer


class _Json(Response):
    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return orjson.dumps(content)


def application(realtime: RealtimeServer) -> Starlette:
    """The admin's routes: GET, POST and DELETE of `/faults`."""

    def state() -> _Json:
        return _Json({"faults": realtime.faults.snapshot(), "counters": realtime.counters.snapshot()})

    async def show(_request: Request) -> Response:
        return state()

    async def change(request: Request) -> Response:
        try:
            switches, actions = faults.split(orjson.loads(await request.body()))
        except orjson.JSONDecodeError:
            return _Json({"error": 'the body is no JSON; an object is expected, as {"drop": 0.1}'}, 422)
        except faults.FaultError as error:
            return _Json({"error": str(error)}, 422)
        realtime.faults.update(switches)
        await realtime.act(actions)
        return state()

    async def clear(_request: Request) -> Response:
        realtime.faults.clear()
        return state()

    return Starlette(
        routes=[
            Route("/faults", show, methods=["GET"]),
            Route("/faults", change, methods=["POST"]),
            Route("/faults", clear, methods=["DELETE"]),
        ]
    )


class _Server(uvicorn.Server):
    """uvicorn as a guest: it says when it listens, and leaves the process's signals alone."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class AdminServer:
    """Serves the admin's routes until it is stopped; `port` is known after `start`."""

    def __init__(self, realtime: RealtimeServer) -> None:
        self.port = 0
        self._realtime = realtime
        self._server: _Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, host: str) -> None:
        """Listen on a free port."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            application(self._realtime),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config)
        self._task = asyncio.create_task(self._serve(self._server, listener), name="standin admin")
        listening = asyncio.create_task(self._server.listening.wait(), name="standin admin starts")
        await asyncio.wait({self._task, listening}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._task.done():
            await self._task

    async def stop(self) -> None:
        """Stop listening and wait until it is done."""
        if self._server is None or self._task is None:
            return
        self._server.should_exit = True
        await self._task

    @staticmethod
    async def _serve(server: _Server, listener: socket.socket) -> None:
        with contextlib.closing(listener):
            await server.serve(sockets=[listener])
