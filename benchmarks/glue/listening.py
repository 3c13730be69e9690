"""The listener of the glue: what the client library calls for each change enqueues a job."""

import asyncio
import os
from typing import Any

from arq import create_pool
from supabase import acreate_client

from benchmarks.glue.arq_jobs import Default


async def listen() -> None:
    pool = await create_pool(Default.redis_settings)
    client = await acreate_client(os.environ["SUPABASE_URL"], os.environ["SUPABASE_SERVICE_ROLE_KEY"])
    tasks = set[asyncio.Task[Any]]()

    def on_insert(changed: Any) -> None:  # noqa: ANN401 - the client says what it is
        task = asyncio.create_task(pool.enqueue_job("copy", changed["data"]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    channel = client.channel("orders")
    channel.on_postgres_changes("INSERT", schema="public", table="orders", callback=on_insert)  # type: ignore[arg-type]
    await channel.subscribe()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(listen())
