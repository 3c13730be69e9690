"""arq, with its defaults and tuned: 50 jobs at once, and a look at the queue every 10 ms."""

import asyncio
import os
from typing import Any

from arq import create_pool
from arq.connections import RedisSettings

from benchmarks.glue.orders import JOBS_AT_ONCE, Database, asked, payload

_AT_ONCE = 200


async def on_start(ctx: dict[str, Any]) -> None:
    ctx["database"] = Database()


async def on_start_tuned(ctx: dict[str, Any]) -> None:
    ctx["database"] = Database(JOBS_AT_ONCE)


async def copy(ctx: dict[str, Any], data: dict[str, Any]) -> None:
    await ctx["database"].copy(data)


class Default:
    """`arq benchmarks.glue.arq_jobs.Default`."""

    functions = (copy,)
    on_startup = on_start
    redis_settings = RedisSettings.from_dsn(os.environ["REDIS_URL"])


class Tuned:
    """`arq benchmarks.glue.arq_jobs.Tuned`; arq reads no inherited settings."""

    functions = (copy,)
    redis_settings = Default.redis_settings
    on_startup = on_start_tuned
    max_jobs = JOBS_AT_ONCE
    poll_delay = 0.01


async def enqueue(count: int) -> None:
    pool = await create_pool(Default.redis_settings)
    for start in range(0, count, _AT_ONCE):
        numbers = range(start, min(start + _AT_ONCE, count))
        await asyncio.gather(*(pool.enqueue_job("copy", payload(number)) for number in numbers))
    await pool.aclose()


if __name__ == "__main__":
    asyncio.run(enqueue(asked()))
