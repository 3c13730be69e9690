"""Examines Realtime: opens a websocket, joins a channel and waits until the tables are subscribed."""

import asyncio
from collections.abc import Sequence

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from config.settings import Settings
from worker.check.findings import Finding
from worker.realtime.connection import Address, CannotConnect
from worker.realtime.frames import TOPIC_PREFIX, Frame, MalformedFrame, Reply, SystemNotice, read_frame
from worker.realtime.subscription import Join
from worker.realtime.timing import Timing

_TOPIC = f"{TOPIC_PREFIX}tailrace-check"
_KEY = "check SUPABASE_SERVICE_ROLE_KEY and that it is this project's"
_TABLES = "see the findings on publication, tables and grants; if there are none, look at Realtime's own log"


async def examine_realtime(settings: Settings, tables: Sequence[tuple[str, str]]) -> list[Finding]:
    """Return what is to be said of Realtime.

    Args:
        settings: with the address and the key.
        tables: (schema, table) pairs to subscribe to.
    """
    if settings.delivery == "webhooks":
        return [Finding("realtime", "skipped", "WORKER_DELIVERY=webhooks does without")]
    timing = Timing()
    address = Address(settings.realtime_url, settings.service_role_key.get_secret_value())
    try:
        socket = await address.open(timing)
    except CannotConnect as error:
        return [Finding("realtime", "problem", error.reason)]
    try:
        await socket.send(address.join(Join(_TOPIC, "1", tuple(tables))))
        return [await _examine(socket, address.words, timing, tables)]
    except ConnectionClosed:
        return [Finding("realtime", "problem", f"{address.words} closed the connection", _KEY)]
    finally:
        await socket.close()


async def _examine(
    socket: ClientConnection, words: str, timing: Timing, tables: Sequence[tuple[str, str]]
) -> Finding:
    joined = False
    try:
        async with asyncio.timeout(timing.join) as limit:
            while True:
                match await _frame(socket):
                    case Reply(topic=topic, ok=False, reason=reason) if topic == _TOPIC:
                        return Finding("realtime", "problem", f"Realtime refuses the channel: {reason}", _KEY)
                    case Reply(topic=topic) if topic == _TOPIC and not tables:
                        return Finding("realtime", "ok", f"{words} accepts the key")
                    case Reply(topic=topic) if topic == _TOPIC:
                        joined = True
                        limit.reschedule(asyncio.get_running_loop().time() + timing.acknowledge)
                    case SystemNotice(topic=topic, ok=ok, message=message) if topic == _TOPIC:
                        if ok:
                            return Finding("realtime", "ok", f"{words}: {message}, {len(tables)} table(s)")
                        return Finding("realtime", "problem", f"no subscription: {message}", _TABLES)
    except TimeoutError:
        what = "joined, but no subscription came" if joined else "no answer to the join"
        return Finding("realtime", "problem", f"{what} in time", _TABLES)


async def _frame(socket: ClientConnection) -> Frame | None:
    try:
        return read_frame(await socket.recv(decode=False))
    except MalformedFrame:
        return None
