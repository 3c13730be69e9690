"""An ASGI application on a socket, inside the loop that is already running.

uvicorn without what belongs to the process: no signal handlers, no logging set-up, no loop of its own. The
socket is bound here first, so that a port that is taken is one clear line and port 0 can be told.
"""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple

import uvicorn
from starlette.types import ASGIApp

from worker.errors import ConfigurationError

_CLOSE_SECONDS = 2  # requests here take milliseconds; longer only delays the end of the process
_BACKLOG = 128
_WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - recognised here, bound by whoever sets it


class Served(NamedTuple):
    """Where an application can be reached."""

    host: str
    port: int

    @property
    def reachable_host(self) -> str:
        """The host by which this machine reaches it: nobody can connect to "every address"."""
        return _WILDCARDS.get(self.host, self.host)

    @property
    def url(self) -> str:
        """The address for this machine, without a slash at its end."""
        host = self.reachable_host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class _Server(uvicorn.Server):
    """uvicorn's server that leaves signals alone and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Signals are the process's: uvicorn's handlers would take SIGTERM away from the drain.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


@asynccontextmanager
async def serve(
    app: ASGIApp, host: str, port: int, *, setting: str = "PORT", closing: asyncio.Event | None = None
) -> AsyncIterator[Served]:
    """Serve an application while the context is open.

    Should the server end by itself, the body of the context is cancelled and a RuntimeError says so.

    Args:
        app: the application.
        host: address to bind, a name or a number.
        port: port to bind; 0 takes any free one, and `Served` tells which.
        setting: name of the setting that chose the port, for the error.
        closing: is set before the server waits for its answers to end.

    Raises:
        ConfigurationError: the address cannot be bound.
    """
    bound = await _bind(host, port, setting)
    server = _Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_CLOSE_SECONDS,
        )
    )
    running = asyncio.create_task(server.serve(sockets=[bound]), name=f"http:{setting.lower()}")
    try:
        await _until_listening(server, running)
        with _cancelled_by(running):
            yield Served(host, bound.getsockname()[1])
    finally:
        if closing is not None:
            closing.set()
        server.should_exit = True
        # gather, not await: a server that was cancelled must not look as if we were.
        await asyncio.gather(running, return_exceptions=True)
        # One that did not end in good order would leave its socket's number behind with the loop, which would
        # then be deaf to the next socket of that number.
        for listening in getattr(server, "servers", ()):
            listening.close()
        bound.close()


async def _bind(host: str, port: int, setting: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        family, _, _, _, address = (await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM))[0]
        return socket.create_server(
            (str(address[0]), int(address[1])), family=socket.AddressFamily(family), backlog=_BACKLOG
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            what = f"{setting} {port} is taken on {host}: end what listens there, or choose a free port"
        elif error.errno in {errno.EACCES, errno.EPERM}:
            what = (
                f"{setting} {port} may not be bound: ports below 1024 need privileges, so choose a higher one"
            )
        else:
            what = f"HEALTH_HOST {host} is no address of this machine ({error.strerror})"
        raise ConfigurationError([what]) from None


async def _until_listening(server: _Server, running: asyncio.Task[None]) -> None:
    listening = asyncio.create_task(server.listening.wait(), name="http:listening")
    try:
        await asyncio.wait({listening, running}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        listening.cancel()
        await asyncio.wait({listening})
    if running.done():
        running.result()
        raise RuntimeError("the HTTP server ended before it listened")


@contextmanager
def _cancelled_by(running: asyncio.Task[None]) -> Iterator[None]:
    """Cancel the body when the server's task ends meanwhile, in the manner of asyncio.timeout."""
    body = asyncio.current_task()
    if body is None:
        raise RuntimeError("serve() needs a running task")
    before = body.cancelling()
    inside = True
    struck = False

    def ended(_task: asyncio.Task[None]) -> None:
        nonlocal struck
        if inside:
            struck = True
            body.cancel("the HTTP server ended")

    running.add_done_callback(ended)
    try:
        yield
    except asyncio.CancelledError:
        if struck and body.uncancel() <= before:
            cause = None if running.cancelled() else running.exception()
            raise RuntimeError("the HTTP server ended by itself") from cause
        raise
    finally:
        inside = False
        running.remove_done_callback(ended)
