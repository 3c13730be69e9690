"""One websocket connection of a script, its frames counted by topic as they arrive.

It keeps the raw text in the player's log. It compares nothing and knows one schema only, that of the fences.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from tests.conformance.frames import parse

FENCE = "fence"
_LARGE = 100_000


class Client:
    """One websocket and the frames it has received, raw and in order."""

    def __init__(self, name: str, socket: ClientConnection, log: list[tuple[str, str]], vsn: str) -> None:
        self.name = name
        self.socket = socket
        self.vsn = vsn
        self.log = log
        self.counts: Counter[str] = Counter()
        self.fences: set[str] = set()
        self.rows: set[str] = set()
        self.arrived = asyncio.Condition()
        self.code: int | None = None
        self.reader = asyncio.create_task(self._read(), name=f"read {name}")

    async def _read(self) -> None:
        try:
            async for raw in self.socket:
                assert isinstance(raw, str), "the server sent a binary frame"
                await self._take(raw)
        except ConnectionClosed:
            pass
        async with self.arrived:
            self.code = self.socket.close_code
            self.arrived.notify_all()

    async def _take(self, raw: str) -> None:
        message: Any = parse(raw) if len(raw) < _LARGE else _head_of(raw)
        topic, ref, payload = (
            (message[2], message[1], message[4])
            if isinstance(message, list)
            else (message["topic"], message["ref"], message["payload"])
        )
        async with self.arrived:
            if isinstance(ref, str) and ref.startswith(FENCE):
                self.fences.add(ref)
            elif _is_fence_row(payload):
                self.rows.add(payload["data"].get("record", {}).get("id"))
            else:
                self.log.append((self.name, raw))
                self.counts[topic] += 1
            self.arrived.notify_all()

    async def wait(self, arrived: Callable[[], bool], patience: float) -> bool:
        """Wait until the condition holds, or the connection is closed; says whether it holds."""
        try:
            async with asyncio.timeout(patience), self.arrived:
                await self.arrived.wait_for(lambda: arrived() or self.code is not None)
        except TimeoutError:
            pass
        return arrived()

    def has(self, counts: Counter[str]) -> Callable[[], bool]:
        """Say whether so many frames of each topic have arrived."""
        return lambda: self.counts >= counts

    async def flush(self, ref: str, patience: float) -> None:
        """Return when everything that the server had queued for this connection has arrived."""
        text = {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": ref}
        message: object = [None, ref, "phoenix", "heartbeat", {}] if self.vsn == "2.0.0" else text
        try:
            await self.socket.send(json.dumps(message))
        except ConnectionClosed:
            return
        await self.wait(lambda: ref in self.fences, patience)

    async def close(self) -> None:
        await self.socket.close()
        await self.reader


def _head_of(raw: str) -> dict[str, Any]:
    """Large frames are parsed once only, at the end."""
    found = re.search(r'"topic":"([^"]*)"', raw[:2000])
    assert found, "a large frame without a topic at its beginning"
    return {"topic": found.group(1), "ref": None, "payload": {}}


def _is_fence_row(payload: object) -> bool:
    data = payload.get("data") if isinstance(payload, dict) else None
    return isinstance(data, dict) and data.get("schema") == FENCE
