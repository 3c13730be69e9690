import asyncio

import pytest

from standin.server.counters import Counters


async def test_who_waits_is_woken_when_the_count_is_reached() -> None:
    counters = Counters()
    waiting = asyncio.create_task(counters.reach("joins", 2))
    await asyncio.sleep(0)
    counters.add("joins")
    await asyncio.sleep(0)
    assert not waiting.done()
    counters.add("joins")
    await waiting


async def test_a_count_that_is_not_reached_is_told_with_its_value() -> None:
    counters = Counters()
    counters.add("dropped", 3)
    with pytest.raises(TimeoutError, match="dropped is 3"):
        await counters.reach("dropped", 4, within=0.01)
