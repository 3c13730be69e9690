"""SAQ on Redis: `python -m saq benchmarks.glue.saq_jobs.settings`."""

import asyncio
import os
from typing import Any

from saq import Queue

from benchmarks.glue.orders import JOBS_AT_ONCE, Database, asked, payload

_AT_ONCE = 200

queue = Queue.from_url(os.environ["REDIS_URL"])
database = Database(JOBS_AT_ONCE)


async def copy(_: Any, *, data: dict[str, Any]) -> None:  # noqa: ANN401 - SAQ's context
    await database.copy(data)


settings = {"queue": queue, "functions": [copy], "concurrency": JOBS_AT_ONCE}


async def enqueue(count: int) -> None:
    await queue.connect()
    for start in range(0, count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, count))
        await asyncio.gather(*(queue.enqueue("copy", data=payload(number)) for number in numbers))
    await queue.disconnect()


if __name__ == "__main__":
    asyncio.run(enqueue(asked()))
