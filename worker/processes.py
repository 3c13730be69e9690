"""What listener and worker do alike, as processes: ring the workers, keep memory in order, come to an end.

Apart from both of them, so that the listener need not load what drains, nor arq's worker.
"""

import asyncio
import gc
from typing import Any

from worker.lanes import Lane
from worker.queue import PatientRedis

GARBAGE = 20_000
"""Objects that may come to be between two collections, as many as a pass makes: 700 by default."""
CANCEL_AGAIN_SECONDS = 4.0


def cancel_until_done(task: "asyncio.Future[Any]") -> None:
    """Cancel a task, and again every few seconds until it ends.

    Python 3.11 may lose a cancellation that meets the end of a timeout (python/cpython#86296).
    """
    if not task.done():
        task.cancel()
        asyncio.get_running_loop().call_later(CANCEL_AGAIN_SECONDS, cancel_until_done, task)


def settle_memory() -> None:
    """Keep what was loaded at the start out of garbage collections: a full one stops the loop for 80 ms.

    And collect less often: of what a pass has in hand nothing is garbage before its end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE, *gc.get_threshold()[1:])


async def announce(redis: PatientRedis, queue: str, lane: Lane) -> None:
    """Put a lane's job on arq's queue, and tell the workers that are waiting."""
    await redis.enqueue_job("drain", lane.handler, lane.number, _queue_name=queue)
    await redis.publish(f"{queue}:jobs", b"")
