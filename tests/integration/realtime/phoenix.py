"""A small Phoenix server that does what a test tells it to, and a reader that collects what is yielded.

The stand-in is the better likeness; this one can do what no server should, at the moment a test wants it.
"""

import asyncio
import http
import itertools
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from worker.change import RawChange
from worker.realtime import CANARY_TABLE, Buffer, RealtimeSource, Timing
from worker.source import Gap, SourceHealth

KEY = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2lnbmF0dXJl"
ORDERS, ITEMS = ("public", "orders"), ("public", "items")
DEADLINE = 20.0

SHORT = Timing(
    heartbeat=0.2,
    heartbeat_reply=1.5,
    join=1.0,
    acknowledge=0.4,
    join_spacing=0.0,
    rejoin=0.05,
    rejoin_max=0.2,
    rejoin_limited=0.05,
    rejoin_refused=0.2,
    canary=1.5,
    reconnect=0.02,
    reconnect_max=0.1,
    refused=0.02,
    refused_max=0.1,
    withheld=0.2,
)


class Signals:
    """Something others wait for: `changed()` when it changes, `await until(condition)` to wait."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                await self._changed.wait()


class Joined:
    """A channel as the server knows it."""

    def __init__(
        self, socket: ServerConnection, topic: str, ref: str, bindings: list[dict[str, Any]]
    ) -> None:
        self.socket, self.topic, self.ref = socket, topic, ref
        self.tables = [(b["schema"], b["table"]) for b in bindings]


class Phoenix(Signals):
    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.refuse: int | None = None
        self.refusal = '{"error":"Failed to validate JWT signature"}'
        self.location = ""
        self.silent = self.frozen = False
        self.acknowledge = True
        self.join_error: str | None = None
        self.bad: set[tuple[str, str]] = set()
        self.handshakes: list[str] = []
        self.sockets: list[ServerConnection] = []
        self.connections = 0
        self.joins: list[dict[str, Any]] = []
        self.heartbeats = 0
        self.channels: dict[str, Joined] = {}
        self._outgoing: dict[ServerConnection, asyncio.Queue[str]] = {}
        self._server: Server | None = None
        self._tokens = itertools.count(1)
        self.canary_fails: Exception | None = None
        self.drop_canaries = 0
        self.canary_parts: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/realtime/v1"

    async def start(self) -> None:
        self._server = await serve(
            self._talk,
            "127.0.0.1",
            self.port,
            process_request=self._admit,
            ping_interval=None,
            close_timeout=0.2,
            compression=None,
            max_size=None,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self.frozen = False
        self.changed()
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        del connection
        self.handshakes.append(request.path)
        self.changed()
        if self.refuse is None:
            return None
        headers = Headers({"Content-Type": "application/json", "Content-Length": str(len(self.refusal))})
        if self.location:
            headers["Location"] = self.location
        return Response(self.refuse, http.HTTPStatus(self.refuse).phrase, headers, self.refusal.encode())

    async def _talk(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        self.connections += 1
        outgoing = self._outgoing[socket] = asyncio.Queue()
        sending = asyncio.create_task(self._send(socket, outgoing))
        self.changed()
        try:
            async for text in socket:
                await self.until(lambda: not self.frozen)
                self._answer(socket, json.loads(text))
        except ConnectionClosed:
            pass
        finally:
            sending.cancel()
            self.sockets.remove(socket)
            del self._outgoing[socket]
            self.channels = {t: c for t, c in self.channels.items() if c.socket is not socket}
            self.changed()

    async def _send(self, socket: ServerConnection, outgoing: asyncio.Queue[str]) -> None:
        # Like the real one, it goes on reading from a client that takes nothing.
        try:
            while True:
                await socket.send(await outgoing.get())
        except ConnectionClosed:
            pass

    def put(self, socket: ServerConnection, text: str) -> None:
        if socket in self._outgoing:
            self._outgoing[socket].put_nowait(text)

    def _answer(self, socket: ServerConnection, frame: dict[str, Any]) -> None:
        topic, ref = frame["topic"], frame["ref"]
        if frame["event"] == "heartbeat":
            self.heartbeats += 1
            self.reply(socket, topic, ref, {"status": "ok", "response": {}})
        elif frame["event"] == "phx_join":
            self.joins.append(frame)
            if self.join_error is not None:
                error = {"status": "error", "response": {"reason": self.join_error}}
                self.reply(socket, topic, ref, error)
            else:
                self._join(socket, topic, ref, frame["payload"]["config"]["postgres_changes"])
        self.changed()

    def _join(self, socket: ServerConnection, topic: str, ref: str, bindings: list[dict[str, Any]]) -> None:
        old = self.channels.get(topic)
        new = self.channels[topic] = Joined(socket, topic, ref, bindings)
        listed = [{"id": place, **binding} for place, binding in enumerate(bindings, 1)]
        self.reply(socket, topic, ref, {"status": "ok", "response": {"postgres_changes": listed}})
        bad = [table for table in new.tables if table in self.bad]
        if bad:
            self.system(
                new,
                "Unable to subscribe to changes with given parameters. Please check Realtime is enabled for"
                f" the given connect parameters: [event: *, schema: {bad[0][0]}, table: {bad[0][1]},"
                " filters: [], select: nil]",
            )
        elif self.acknowledge:
            self.system(new)
        if old is not None and old.socket is socket:
            self.end(old)

    def frame(
        self, socket: ServerConnection, topic: str, event: str, payload: object, ref: str | None = None
    ) -> None:
        text = json.dumps({"ref": ref, "event": event, "topic": topic, "payload": payload})
        self.put(socket, text)

    def reply(self, socket: ServerConnection, topic: str, ref: str, payload: object) -> None:
        self.frame(socket, topic, "phx_reply", payload, ref)

    def system(self, channel: Joined, error: str = "", extension: str = "postgres_changes") -> None:
        payload = {
            "message": error or "Subscribed to PostgreSQL",
            "status": "error" if error else "ok",
            "extension": extension,
            "channel": channel.topic.removeprefix("realtime:"),
        }
        self.frame(channel.socket, channel.topic, "system", payload)

    def end(self, channel: Joined, event: str = "phx_close") -> None:
        self.frame(channel.socket, channel.topic, event, {}, channel.ref)

    def channel_of(self, table: tuple[str, str]) -> Joined:
        return next(channel for channel in self.channels.values() if table in channel.tables)

    def raw(self, table: tuple[str, str], data: str) -> None:
        """Send a change of a table, `data` being the exact text of payload.data."""
        channel = self.channel_of(table)
        text = (
            f'{{"ref":null,"event":"postgres_changes","topic":"{channel.topic}",'
            f'"payload":{{"data":{data},"ids":[1]}}}}'
        )
        self.put(channel.socket, text)

    def change(self, table: tuple[str, str], number: int, **parts: object) -> None:
        self.raw(table, change_text(table, number, **parts))

    async def write_canary(self) -> str:
        """What the source is given: commits a canary, which comes back as a change."""
        if self.canary_fails is not None:
            raise self.canary_fails
        token = f"token-{next(self._tokens)}"
        if self.drop_canaries:
            self.drop_canaries -= 1
        elif not (self.silent or self.frozen) and any(
            CANARY_TABLE in c.tables for c in self.channels.values()
        ):
            self.change(CANARY_TABLE, 1, **{"record": {"id": 1, "token": token}, **self.canary_parts})
        return token


def change_text(table: tuple[str, str], number: int, **parts: object) -> str:
    data = {
        "table": table[1],
        "type": "INSERT",
        "record": {"id": number},
        "columns": [{"name": "id", "type": "int8"}],
        "errors": None,
        "schema": table[0],
        "commit_timestamp": "2026-11-20T11:00:20.752Z",
    }
    return json.dumps({**data, **parts})


class Reading(Signals):
    """Reads a source in a task of its own."""

    def __init__(self, source: RealtimeSource) -> None:
        super().__init__()
        self.source = source
        self.items: list[RawChange | Gap] = []
        self.taking = asyncio.Event()
        self.taking.set()

    @property
    def numbers(self) -> list[int]:
        return [json.loads(i.payload)["record"]["id"] for i in self.items if isinstance(i, RawChange)]

    @property
    def gaps(self) -> list[Gap]:
        return [item for item in self.items if isinstance(item, Gap)]

    async def run(self) -> None:
        async with aclosing(self.source.read()) as batches:
            async for batch in batches:
                assert batch
                self.items.extend(batch)
                self.changed()
                await self.taking.wait()

    async def healthy(self, condition: Callable[[SourceHealth], object]) -> SourceHealth:
        """Wait for a state of health."""
        async with asyncio.timeout(DEADLINE):
            while not condition(self.source.health()):
                await asyncio.sleep(0.01)
        return self.source.health()

    async def ready(self) -> None:
        await self.healthy(lambda health: health.ready)


class Start(Protocol):
    """Starts to read a source; further keyword arguments are fields of Timing."""

    def __call__(
        self,
        *tables: tuple[str, str],
        key: str = KEY,
        url: str = "",
        buffer: Buffer | None = None,
        canary_seconds: float = 0.1,
        **waits: float,
    ) -> AbstractAsyncContextManager[Reading]: ...
