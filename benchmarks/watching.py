"""A websocket client beside the listener, in a process of its own: notes when the frame of each row arrived.

It is subscribed as the listener is, and does nothing between frames but wait. What it has noted it writes
when it is asked to end (SIGTERM): a JSON object from id of the row to nanoseconds since 1970.
"""

import argparse
import asyncio
import contextlib
import signal
import time
from pathlib import Path

import orjson
import uvloop
from websockets.asyncio.client import ClientConnection, connect

_TOPIC = "realtime:benchmark"
_HEARTBEAT_SECONDS = 20.0


async def watch(url: str, key: str, table: str) -> list[tuple[int, str | bytes]]:
    """Take frames with their time of arrival, until SIGTERM."""
    asked_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asked_to_end.set)
    frames: list[tuple[int, str | bytes]] = []
    address = f"{url}/websocket?apikey={key}&vsn=1.0.0"
    async with connect(address, max_size=None, compression=None) as socket:
        await socket.send(_join(key, table))
        beating = asyncio.create_task(_beat(socket), name="watching: heartbeat")
        taking = asyncio.create_task(_take(socket, frames), name="watching: frames")
        ending = asyncio.create_task(asked_to_end.wait(), name="watching: end")
        await asyncio.wait({taking, ending}, return_when=asyncio.FIRST_COMPLETED)
        for task in (beating, taking, ending):
            task.cancel()
        await asyncio.gather(beating, ending, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            await taking
    return frames


async def _take(socket: ClientConnection, frames: list[tuple[int, str | bytes]]) -> None:
    live = False
    async for text in socket:
        frames.append((time.time_ns(), text))  # before anything is parsed
        if not live and orjson.loads(text)["event"] == "system":
            live = True
            print(text, flush=True)
    raise ConnectionError("the stand-in has closed the connection")


async def _beat(socket: ClientConnection) -> None:
    while True:
        await asyncio.sleep(_HEARTBEAT_SECONDS)
        await socket.send('{"topic":"phoenix","event":"heartbeat","payload":{},"ref":"heartbeat"}')


def _join(key: str, table: str) -> str:
    binding = {"event": "*", "schema": "public", "table": table}
    config = {"broadcast": {}, "presence": {}, "postgres_changes": [binding], "private": False}
    payload = {"config": config, "access_token": key}
    return orjson.dumps({"topic": _TOPIC, "event": "phx_join", "payload": payload, "ref": "1"}).decode()


def arrivals(frames: list[tuple[int, str | bytes]]) -> dict[str, int]:
    """Read when the frame of each row arrived."""
    found: dict[str, int] = {}
    for at, text in frames:
        frame = orjson.loads(text)
        if frame["event"] == "postgres_changes":
            found[str(frame["payload"]["data"]["record"]["id"])] = at
    return found


def main() -> None:
    made = argparse.ArgumentParser()
    for name in ("url", "key", "table"):
        made.add_argument(f"--{name}", required=True)
    made.add_argument("--out", type=Path, required=True)
    options = made.parse_args()
    frames = uvloop.run(watch(options.url, options.key, options.table))
    options.out.write_bytes(orjson.dumps(arrivals(frames)))


if __name__ == "__main__":
    main()
