"""What is remembered of slot and lanes when reading begins anew."""

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.mechanism.bench import Bench
from worker import Change, Handlers
from worker.reading import reached, record


@pytest.fixture
def on() -> Handlers:
    on = Handlers()

    @on.change("items", name="one")
    async def one(change: Change, session: AsyncSession) -> None:
        """Nothing is done here."""

    return on


@pytest.mark.parametrize("anew", [False, True])
async def test_lanes_that_are_further_than_the_slot_stay_there_unless_the_log_is_another(
    at: Bench, on: Handlers, *, anew: bool
) -> None:
    await at.load(on)
    await at.db.execute(
        "update tailrace.lanes set lsn = lane * 100, ordinal = 7, arrived_lsn = 1000, arrived_ordinal = 1"
    )
    async with at.engine.begin() as connection:
        await record.restart_at(connection, 200, anew=anew, new_history=False)
    found = await at.db.fetch("select lsn, ordinal, arrived_lsn from tailrace.lanes order by lane")
    forward = [(200, -1, None), (200, -1, None), (200, 7, None), (300, 7, None)]
    assert [tuple(row) for row in found] == ([(200, -1, None)] * 4 if anew else forward)


async def test_redis_remembers_how_far_the_log_of_a_cluster_was_read(at: Bench) -> None:
    assert await reached.read(at.lanes, "7") == 0
    await reached.note(at.lanes, "7", 2**40)
    assert await reached.read(at.lanes, "7") == 2**40
    assert await reached.read(at.lanes, "8") == 0
