"""A listener: one connection joined to the changes of one table, for tests that cannot foresee each frame."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.client import connect

from tests.conformance.client import Client
from tests.conformance.frames import parse
from tests.conformance.player import signed

PATIENCE = 20.0
_TOPIC = "realtime:listening"


def key(role: str, secret: str) -> str:
    """A key of a role that lives for an hour."""
    return signed({"role": role, "exp": int(time.time()) + 3600}, secret)


class Listener(Client):
    """A client that counts the changes of its one subscription."""

    @property
    def frames(self) -> list[dict[str, Any]]:
        """All frames of the topic, parsed; numbers are their digits."""
        return [frame for _, raw in self.log if (frame := parse(raw))["topic"] == _TOPIC]

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The data of all changes."""
        return [f["payload"]["data"] for f in self.frames if f["event"] == "postgres_changes"]

    @property
    def ids(self) -> list[int]:
        """The `id` of each change's row, in order of arrival."""
        return [int(change["record"]["id"]) for change in self.changes]

    async def has_frames(self, number: int, patience: float = PATIENCE) -> None:
        """Wait until so many frames of the topic have arrived."""
        arrived = await self.wait(lambda: self.counts[_TOPIC] >= number, patience)
        assert arrived, f"{self.counts[_TOPIC]} frames, not {number}"

    async def has_changes(self, number: int) -> None:
        """Wait for so many changes; the two frames before them are the reply and the acknowledgement."""
        await self.has_frames(number + 2)


@asynccontextmanager
async def listening(url: str, apikey: str, binding: dict[str, Any]) -> AsyncIterator[Listener]:
    """Join, wait for the acknowledgement, and leave by closing the connection."""
    socket = await connect(
        f"{url}/socket/websocket?apikey={apikey}&vsn=1.0.0", max_size=None, max_queue=None, ping_interval=None
    )
    listener = Listener("listener", socket, [], "1.0.0")
    payload = {"config": {"postgres_changes": [binding]}}
    join = {"topic": _TOPIC, "event": "phx_join", "payload": payload, "ref": "1", "join_ref": "1"}
    try:
        await socket.send(json.dumps(join))
        await listener.has_frames(2)
        acknowledged = listener.frames[1]["payload"]
        assert acknowledged["message"] == "Subscribed to PostgreSQL", acknowledged
        yield listener
    finally:
        await listener.close()


def every(table: str) -> dict[str, Any]:
    """A binding to all changes of a table in public."""
    return {"event": "*", "schema": "public", "table": table}
