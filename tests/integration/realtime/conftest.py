"""The scripted server and the reader, as fixtures."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.integration.realtime.phoenix import ITEMS, KEY, ORDERS, SHORT, Phoenix, Reading, Start
from worker.realtime import Buffer, RealtimeSource


@pytest.fixture
async def phoenix() -> AsyncIterator[Phoenix]:
    server = Phoenix()
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def start(phoenix: Phoenix) -> Start:
    """Give `async with start() as reading:`; keyword arguments that are waits shorten or lengthen them."""

    @asynccontextmanager
    async def reading(
        *tables: tuple[str, str],
        key: str = KEY,
        url: str = "",
        buffer: Buffer | None = None,
        canary_seconds: float = 0.1,
        **waits: float,
    ) -> AsyncIterator[Reading]:
        source = RealtimeSource(
            url or phoenix.url,
            key,
            tables or (ORDERS, ITEMS),
            phoenix.write_canary,
            canary_seconds=canary_seconds,
            timing=replace(SHORT, **waits),
            buffer=buffer,
        )
        reading = Reading(source)
        task = asyncio.create_task(reading.run(), name="test: read")
        try:
            yield reading
        finally:
            reading.taking.set()
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.result()

    return reading


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    yield
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert [name for name in names if name.startswith(("realtime:", "test:"))] == []
