"""Which lanes of a handler, in this process, go through one transaction: those that would wait anyway.

As databases do it with commits. While few passes are under way a lane begins its own at once; else it waits
for one of them to end, and then all that wait go together. So nothing is waited for where there is time,
and where there is not, the cost of a transaction is shared by the more lanes the busier the process is.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from worker.draining.passes import Progress
from worker.lanes import Lane

AT_ONCE = 1
"""Passes of a handler under way, from which on further lanes wait for each other."""
MOST = 8
"""Lanes in one transaction: of more that wait, the others begin one of their own at the same time."""
PATIENCE_SECONDS = 0.1
"""A lane waits no longer than this: what is under way then does not get on, and holds up no other."""

Alone = Callable[[Lane], Awaitable[Progress]]
Together = Callable[[list[Lane]], Awaitable[Mapping[Lane, Progress]]]


class Sharing:
    """Of one handler.

    Args:
        alone: makes a pass over one lane.
        together: makes one over several; the lanes that it leaves out are to be passed over alone.
    """

    def __init__(self, alone: Alone, together: Together) -> None:
        self._alone = alone
        self._together = together
        self._under_way: set[object] = set()
        self._waiting: dict[Lane, asyncio.Future[Progress | None]] = {}

    async def run(self, lane: Lane) -> Progress:
        """Make a pass over a lane, by itself or with others."""
        if len(self._under_way) >= AT_ONCE and (progress := await self._wait(lane)) is not None:
            return progress
        token = object()
        self._under_way.add(token)
        try:
            await asyncio.sleep(0)  # those that were rung by the same bell come along
            done = await self._take_along(lane)
            return done[lane] if lane in done else await self._alone(lane)
        finally:
            self._under_way.discard(token)
            if len(self._under_way) < AT_ONCE:
                self._go_on()

    async def _take_along(self, lane: Lane) -> Mapping[Lane, Progress]:
        others = {one: self._waiting.pop(one) for one in [*self._waiting][: MOST - 1]}
        self._go_on()
        if not others:
            return {}
        done: Mapping[Lane, Progress] = {}
        try:
            done = await self._together([lane, *others])
        finally:
            for other, future in others.items():
                if not future.done():
                    future.set_result(done.get(other))
        return done

    async def _wait(self, lane: Lane) -> Progress | None:
        """Wait to be taken along; None where the lane has to see to itself."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Progress | None] = loop.create_future()
        self._waiting[lane] = future
        timer = loop.call_later(PATIENCE_SECONDS, self._lose_patience, lane)
        try:
            return await future
        finally:
            timer.cancel()
            if self._waiting.get(lane) is future:
                del self._waiting[lane]

    def _lose_patience(self, lane: Lane) -> None:
        if lane in self._waiting:
            self._under_way.clear()
            self._go_on()

    def _go_on(self) -> None:
        """Let the lane that has waited longest begin: it takes the others along."""
        for lane, future in self._waiting.items():
            if not future.done():
                del self._waiting[lane]
                future.set_result(None)
                return
