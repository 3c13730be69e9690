"""One client's TCP connection and what waits to be sent on it.

It moves bytes and frames; it knows no channel. It can be frozen: then it reads and answers nothing, websocket
pings included, while TCP stays open.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from standin.server.frames import Version

_FRAME_OVERHEAD = 200
_PATIENCE = 2.0


class Connection(ServerConnection):
    """A websocket whose incoming bytes can be held back.

    Attributes:
        version: of the frames, known after the handshake.
        claims: of the token the client connected with, known after the handshake.
        silenced: True where changes are to be withheld for the connection's life.
    """

    version: Version = 1
    silenced = False

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 (the library's own, passed through)
        opened: Callable[["Connection"], None],
        closed: Callable[["Connection"], None],
        **options: Any,  # noqa: ANN401 (as above)
    ) -> None:
        super().__init__(*arguments, **options)
        self.claims: dict[str, Any] = {}
        self.token = ""
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.last_received = self.loop.time()
        self._opened = opened
        self._closed = closed
        self._held: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """TCP is there; the handshake comes next."""
        super().connection_made(transport)
        self._opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """TCP is gone."""
        self.flowing.set()
        super().connection_lost(exc)
        self._closed(self)

    def data_received(self, data: bytes) -> None:
        """Read, unless frozen: then keep it for later."""
        self.last_received = self.loop.time()
        if self.flowing.is_set():
            super().data_received(data)
        else:
            self._held.append(data)

    def freeze(self) -> None:
        """Neither read nor write from now on; TCP stays open."""
        self.flowing.clear()

    def thaw(self) -> None:
        """Go on where the connection was frozen, with what came meanwhile."""
        if self.flowing.is_set():
            return
        self.flowing.set()
        self.last_received = self.loop.time()
        held, self._held = self._held, []
        for data in held:
            super().data_received(data)

    async def pause(self, seconds: float) -> None:
        """Wait before an answer, but not beyond the end of the connection."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.wait_closed()

    def cut(self) -> None:
        """End TCP at once, without a close frame: the client sees 1006."""
        self.transport.abort()


class Outbox:
    """Frames that wait for one client, within a bound: who does not read is cut off, the others go on."""

    def __init__(
        self, connection: Connection, *, limit: int, sent: Callable[[], None], cut: Callable[[], None]
    ) -> None:
        self._connection = connection
        self._limit = limit
        self._sent = sent
        self._cut = cut
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self._eased = asyncio.Event()
        self._patience = _PATIENCE
        self._overflowed = False
        self.sending_since: float | None = None

    @property
    def lagging(self) -> bool:
        """Whether the feed should pause for this client: half its bound is used, and patience is left."""
        return self._bytes > self._limit // 2 and self._patience > 0 and not self._overflowed

    def put(self, frame: bytes) -> None:
        """Queue a frame; never waits."""
        if self._overflowed:
            return
        self._bytes += len(frame) + _FRAME_OVERHEAD
        if self._bytes > self._limit:
            self._overflowed = True
            self._frames.clear()
            self._cut()
            return
        self._frames.append(frame)
        self._filled.set()

    async def ease(self) -> None:
        """Let a client that lags catch up: for two seconds in all, until nothing waits for it any more.

        So a client that reads, but is slower than a large transaction, is not cut; and one that does not
        read cannot hold up the others for longer.
        """
        self._eased.clear()
        started = asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience):
                await self._eased.wait()
        self._patience -= asyncio.get_running_loop().time() - started

    async def run(self) -> None:
        """Send what is queued, in order, until the connection closes."""
        loop = asyncio.get_running_loop()
        connection = self._connection
        try:
            while True:
                while self._frames:
                    if not connection.flowing.is_set():
                        await connection.flowing.wait()
                    frame = self._frames.popleft()
                    self.sending_since = loop.time()
                    await connection.send(frame, text=True)
                    self.sending_since = None
                    self._bytes -= len(frame) + _FRAME_OVERHEAD
                    self._sent()
                    if self._bytes <= self._limit // 2:
                        self._eased.set()
                self._patience = _PATIENCE
                self._filled.clear()
                await self._filled.wait()
        except ConnectionClosed:
            self._eased.set()
