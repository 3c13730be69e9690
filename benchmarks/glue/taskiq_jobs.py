"""taskiq on a Redis stream: `python -m taskiq worker benchmarks.glue.taskiq_jobs:broker --workers 1`."""

import asyncio
import os
from typing import Any

from taskiq_redis import RedisStreamBroker

from benchmarks.glue.orders import JOBS_AT_ONCE, Database, asked, payload

_AT_ONCE = 200

broker = RedisStreamBroker(os.environ["REDIS_URL"])
database = Database(JOBS_AT_ONCE)


@broker.task(task_name="copy")  # type: ignore[untyped-decorator]
async def copy(data: dict[str, Any]) -> None:
    await database.copy(data)


async def enqueue(count: int) -> None:
    await broker.startup()
    for start in range(0, count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, count))
        await asyncio.gather(*(copy.kiq(payload(number)) for number in numbers))
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(enqueue(asked()))
