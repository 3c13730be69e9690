"""Lets Redis forget what Postgres says is applied, for several lanes in one go.

Entries that are applied do no harm in their streams but for their memory, so they need not go at once: a
worker that drains many lanes, a change at a time, would else make a round trip for each.
"""

import asyncio
import contextlib

from redis.exceptions import RedisError

from worker.lanes import Lane, Lanes, Read

SECONDS = 0.05
"""How long entries may stay after they were applied: shorter would be a round trip for every few passes."""


class Trims:
    """What is applied and still to be trimmed.

    Args:
        lanes: to be trimmed.
        seconds: from the first that is added until all are trimmed; 0: each at once.
    """

    def __init__(self, lanes: Lanes, seconds: float = 0.0) -> None:
        self.lanes = lanes
        self._seconds = seconds
        self._due: dict[tuple[str, Lane], Read] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def add(self, generation: str, lane: Lane, last: Read) -> None:
        """Have a lane trimmed up to an entry.

        Raises:
            RedisError: it was to be done at once, and Redis is away.
        """
        if not self._seconds:
            await self.lanes.trim(generation, {lane: last})
            return
        self._due[generation, lane] = last
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._start)

    def _start(self) -> None:
        self._timer = None
        task = asyncio.create_task(self.flush(), name="worker: trim")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def flush(self) -> None:
        """Trim now. Where Redis does not hear of it the lane's next pass says it again."""
        due, self._due = self._due, {}
        by_generation: dict[str, dict[Lane, Read]] = {}
        for (generation, lane), last in due.items():
            by_generation.setdefault(generation, {})[lane] = last
        with contextlib.suppress(RedisError, OSError):
            for generation, lasts in by_generation.items():
                await self.lanes.trim(generation, lasts)
