"""Up to where the log has been read, remembered outside Postgres.

A database that is set back to an earlier state by its files remembers only that state, and may be on the
same timeline: nothing in it tells that it has been further. A log that ends before the place that was read
does. Redis remembers that place; as a hint: without it such a database looks like one that was restarted.
"""

import asyncio

from redis.exceptions import RedisError

from worker.lanes import Lanes

NOTE_SECONDS = 1.0
"""It is noted on the way out, too, and must not hold that up."""


def _key(lanes: Lanes) -> str:
    return f"{lanes.prefix}:reached"


async def note(lanes: Lanes, system_identifier: str, lsn: int) -> bool:
    """Remember up to where the log of this cluster has been read; False where Redis is away."""
    try:
        async with asyncio.timeout(NOTE_SECONDS):
            await lanes.raw("SET", _key(lanes), f"{system_identifier} {lsn}")
    except (RedisError, OSError, TimeoutError):
        return False  # the journal tells
    return True


async def read(lanes: Lanes, system_identifier: str) -> int:
    """Tell up to where the log of this cluster has been read; 0 where nobody knows."""
    found: bytes | None = await lanes.raw("GET", _key(lanes))
    system, _, lsn = (found or b"").decode().partition(" ")
    return int(lsn) if system == system_identifier else 0
