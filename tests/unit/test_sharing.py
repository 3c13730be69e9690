"""Who waits for whom, of a handler's lanes in one process."""

import asyncio
from collections.abc import Mapping

import pytest

from worker.draining.passes import Progress
from worker.draining.sharing import Sharing
from worker.lanes import Lane

LANES = [Lane("h", number) for number in range(5)]


class Passes:
    """Passes that end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[list[Lane]] = []
        self.refused: set[Lane] = set()
        self.error: Exception | None = None
        self._news = asyncio.Condition()
        self._open: list[asyncio.Event] = []
        self.sharing = Sharing(self._alone, self._together)

    async def _begin(self, lanes: list[Lane]) -> None:
        end = asyncio.Event()
        async with self._news:
            self.begun.append(lanes)
            self._open.append(end)
            self._news.notify_all()
        await end.wait()

    async def _alone(self, lane: Lane) -> Progress:
        await self._begin([lane])
        return Progress(read=1)

    async def _together(self, lanes: list[Lane]) -> Mapping[Lane, Progress]:
        await self._begin(lanes)
        if self.error is not None:
            raise self.error
        return {lane: Progress(read=2) for lane in lanes if lane not in self.refused}

    async def begin(self, count: int) -> None:
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(lambda: len(self.begun) >= count)

    def end(self, index: int) -> None:
        self._open[index].set()

    def run(self, lane: Lane) -> asyncio.Task[Progress]:
        return asyncio.create_task(self.sharing.run(lane))


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    monkeypatch.setattr("worker.draining.sharing.PATIENCE_SECONDS", 60.0)
    return Passes()


async def test_those_that_wait_go_together(passes: Passes) -> None:
    first = passes.run(LANES[0])
    await passes.begin(1)
    others = [passes.run(lane) for lane in LANES[1:]]
    await settled()
    assert passes.begun == [LANES[:1]]
    passes.end(0)
    await passes.begin(2)
    assert passes.begun[1] == LANES[1:]
    passes.end(1)
    assert (await first).read == 1
    assert [one.read for one in await asyncio.gather(*others)] == [2] * 4


async def test_those_that_begin_together_go_together(passes: Passes) -> None:
    running = [passes.run(lane) for lane in LANES]
    await passes.begin(1)
    assert passes.begun == [LANES]
    passes.end(0)
    assert [one.read for one in await asyncio.gather(*running)] == [2] * 5


async def test_more_than_one_transaction_should_have_go_in_several_at_once(
    passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.draining.sharing.MOST", 2)
    running = [passes.run(lane) for lane in LANES]
    await passes.begin(3)
    assert sorted(lane for lanes in passes.begun for lane in lanes) == LANES
    assert max(map(len, passes.begun)) == 2
    for index in range(3):
        passes.end(index)
    await asyncio.gather(*running)


async def test_a_lane_that_is_left_out_goes_alone_and_by_itself(passes: Passes) -> None:
    first = passes.run(LANES[0])
    await passes.begin(1)
    passes.refused = {LANES[2]}
    others = [passes.run(lane) for lane in LANES[1:3]]
    await settled()
    passes.end(0)
    await passes.begin(2)
    passes.end(1)
    await passes.begin(3)
    assert passes.begun[2] == [LANES[2]]
    passes.end(2)
    assert [one.read for one in await asyncio.gather(first, *others)] == [1, 2, 1]


@pytest.mark.parametrize("ends", ["cancelled", "fails"])
async def test_whatever_becomes_of_the_first_the_others_go_on(passes: Passes, ends: str) -> None:
    first = passes.run(LANES[0])
    await passes.begin(1)
    others = [passes.run(lane) for lane in LANES[1:4]]
    await settled()
    passes.end(0)
    await passes.begin(2)
    if ends == "cancelled":
        others[0].cancel()
    else:
        passes.error = ZeroDivisionError()
        passes.end(1)
    await passes.begin(3)
    passes.error = None
    for index in (2, 3):
        await passes.begin(index + 1)
        passes.end(index)
    results = await asyncio.gather(first, *others, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError if ends == "cancelled" else ZeroDivisionError)
    assert all(isinstance(one, Progress) for one in (results[0], *results[2:]))


async def test_who_waits_and_is_cancelled_leaves_no_trace(passes: Passes) -> None:
    first = passes.run(LANES[0])
    await passes.begin(1)
    gone, stays = passes.run(LANES[1]), passes.run(LANES[2])
    await settled()
    gone.cancel()
    await settled()
    passes.end(0)
    await passes.begin(2)
    assert passes.begun[1] == [LANES[2]]
    passes.end(1)
    await asyncio.gather(first, stays)


async def test_what_does_not_get_on_is_waited_for_by_nobody(
    passes: Passes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.draining.sharing.PATIENCE_SECONDS", 0.01)
    first = passes.run(LANES[0])
    await passes.begin(1)
    second = passes.run(LANES[1])
    await passes.begin(2)
    assert passes.begun == [LANES[:1], LANES[1:2]]
    passes.end(0)
    passes.end(1)
    await asyncio.gather(first, second)
