"""A websocket server on a feed that tests drive by hand, and a plain websocket client."""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from standin import LOCAL_JWT_SECRET, Behaviour
from standin.changes import BadSubscription, Binding, Delivery, binding_id
from standin.server import tokens
from standin.server.realtime import RealtimeServer

SERVICE_KEY = tokens.project_key("service_role", LOCAL_JWT_SECRET)
BINDING = {"event": "*", "schema": "public", "table": "t"}


class HandFeed:
    """A feed without a database: tests commit changes by hand. The table `missing` is refused."""

    def __init__(self) -> None:
        self.subscribers: dict[Hashable, tuple[Binding, ...]] = {}
        self.claims: list[Mapping[str, Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._ids = itertools.count(1)
        self.deliver: Callable[[Sequence[Delivery]], Any]

    async def subscribe(
        self, subscriber: Hashable, bindings: Sequence[Binding], claims: Mapping[str, Any]
    ) -> None:
        await self.gate.wait()
        if any(binding.table == "missing" for binding in bindings):
            raise BadSubscription("no such table")
        self.subscribers[subscriber] = tuple(bindings)
        self.claims.append(claims)

    async def unsubscribe(self, subscriber: Hashable) -> None:
        self.subscribers.pop(subscriber, None)

    async def commit(self, *values: str, table: str = "t") -> None:
        deliveries = []
        for value in values:
            record = b'{"v": "%s", "id": %d}' % (value.encode(), next(self._ids))
            data = b'{"table":"%s","type":"INSERT","record":%s,"columns":[],"errors":null,' % (
                table.encode(),
                record,
            )
            data += b'"schema":"public","commit_timestamp":"2026-01-02T03:04:05.678Z"}'
            for subscriber, bindings in self.subscribers.items():
                ids = tuple(binding_id(b) for b in reversed(bindings) if b.table == table)
                if ids:
                    deliveries.append(Delivery(subscriber, data, ids))
        await self.deliver(deliveries)


class Client:
    """A client that writes and reads frames as they are."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, message: object) -> None:
        await self.socket.send(orjson.dumps(message), text=True)

    async def receive(self) -> Any:
        async with asyncio.timeout(10):
            return orjson.loads(await self.socket.recv())

    async def values(self, count: int) -> list[Any]:
        """The column v of the next `count` frames."""
        frames = [await self.receive() for _ in range(count)]
        return [frame["payload"]["data"]["record"]["v"] for frame in frames]

    async def join(
        self,
        topic: str = "realtime:a",
        *bindings: object,
        ref: str | None = "1",
        join_ref: str | None = "1",
        token: str | None = None,
        **config: object,
    ) -> None:
        payload: dict[str, Any] = {"config": {"postgres_changes": list(bindings or (BINDING,)), **config}}
        if token is not None:
            payload["access_token"] = token
        message = {"topic": topic, "event": "phx_join", "payload": payload, "ref": ref}
        await self.send(message if join_ref is None else {**message, "join_ref": join_ref})

    async def subscribe(self, topic: str = "realtime:a", *bindings: object, **options: Any) -> None:
        """Join and read the reply and the acknowledgement."""
        await self.join(topic, *bindings, **options)
        reply = await self.receive()
        assert reply["payload"]["status"] == "ok", reply
        acknowledged = await self.receive()
        assert acknowledged["payload"]["message"] == "Subscribed to PostgreSQL", acknowledged

    async def heartbeat(self) -> None:
        """Send one, and expect its answer as the next frame: nothing else was on its way."""
        await self.send({"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "hb"})
        answer = {
            "ref": "hb",
            "event": "phx_reply",
            "topic": "phoenix",
            "payload": {"status": "ok", "response": {}},
        }
        assert await self.receive() == answer

    async def closed(self) -> int | None:
        """Read on to the end of the connection, and give the close code."""
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await self.socket.recv()
        return self.socket.close_code


class Running:
    """A server with its feed."""

    def __init__(self, realtime: RealtimeServer, feed: HandFeed) -> None:
        self.realtime = realtime
        self.feed = feed
        self.counters = realtime.counters
        self.faults = realtime.faults

    def url(
        self, key: str = SERVICE_KEY, version: str = "1.0.0", path: str = "/realtime/v1/websocket"
    ) -> str:
        return f"ws://127.0.0.1:{self.realtime.port}{path}?apikey={key}&vsn={version}"

    @contextlib.asynccontextmanager
    async def client(
        self,
        *,
        key: str = SERVICE_KEY,
        version: str = "1.0.0",
        **options: Any,
    ) -> AsyncIterator[Client]:
        defaults = {"compression": None, "ping_interval": None, "close_timeout": 1}
        async with connect(self.url(key, version), **{**defaults, **options}) as socket:
            yield Client(socket)


Start = Callable[..., AbstractAsyncContextManager[Running]]


@contextlib.asynccontextmanager
async def running(behaviour: Behaviour | None = None, seed: int = 1) -> AsyncIterator[Running]:
    others = asyncio.all_tasks()  # of a server that lives longer than this one
    realtime = RealtimeServer(secret=LOCAL_JWT_SECRET, behaviour=behaviour or Behaviour(), seed=seed)
    feed = HandFeed()
    feed.deliver = realtime.deliver
    await realtime.start("127.0.0.1", 0, feed)
    try:
        yield Running(realtime, feed)
    finally:
        before = {task for task in asyncio.all_tasks() - others if "standin" in task.get_name()}
        await realtime.stop()
        left = {task.get_name() for task in before if not task.done()}
        assert not left
        assert realtime.counters["connections"] == 0
        assert realtime.counters["channels"] == 0
        assert not feed.subscribers
