"""Procrastinate, its queue in Postgres: `procrastinate -a benchmarks.glue.procrastinate_jobs.app worker`."""

import asyncio
import os
from typing import Any

from procrastinate import App, PsycopgConnector

from benchmarks.glue.orders import JOBS_AT_ONCE, Database, asked, payload

app = App(connector=PsycopgConnector(conninfo=os.environ["DATABASE_URL"]))
database = Database(JOBS_AT_ONCE)


@app.task(name="copy")  # type: ignore[untyped-decorator]
async def copy(data: dict[str, Any]) -> None:
    await database.copy(data)


async def enqueue(count: int) -> None:
    async with app.open_async():
        if not await app.check_connection_async():
            await app.schema_manager.apply_schema_async()
        await app.connector.execute_query_async("truncate procrastinate_jobs cascade")
        await copy.batch_defer_async(*({"data": payload(number)} for number in range(count)))


if __name__ == "__main__":
    asyncio.run(enqueue(asked()))
