"""A backlog in Redis that can be drained again and again from exactly the same state.

It is written once by a real listener, then kept aside: Redis's keys as they are, and the positions of the
lanes.
"""

import asyncio
import json
import time
import urllib.request
from typing import Any, Final

from redis.asyncio import Redis

from benchmarks.stack import QUEUE, Stack
from examples.demo.processes import Child, DemoError

APPLIED: Final = "select coalesce(sum(applied), 0)::bigint from tailrace.lanes"
_FILL_SECONDS: Final = 600.0
_LOOK_SECONDS: Final = 0.2
_FIRST_LOOK_SECONDS: Final = 0.005
_NEXT_LOOK_SECONDS: Final = 0.05
_AT_ONCE: Final = 500
_RESTORED_BYTES: Final = 64 << 20
"""Of one transaction of Redis, which keeps all that is queued in it in memory."""
_RESET: Final = """
delete from tailrace.lanes;
insert into tailrace.lanes select * from lanes_kept;
vacuum analyze;
checkpoint
"""
# A first look while the lanes are on their way, and the last commit: between them nothing was waited for.
_PROGRESS: Final = """
select extract(epoch from clock_timestamp())::float8, coalesce(sum(applied), 0)::bigint from tailrace.lanes
"""
_LAST_COMMIT: Final = """
select extract(epoch from max(pg_xact_commit_timestamp(xmin)))::float8 from tailrace.lanes where applied > 0
"""

INSERT: Final = (
    "insert into orders (customer_id, status, amount)"
    " select 1 + n % 200, 'new', (n % 50000) / 100.0 from generate_series($1::int, $2::int) n"
)


class Backlog:
    """Entries of all lanes, and what is emptied before they are let go again."""

    def __init__(self, running: Stack, redis: Any, derived: str) -> None:  # noqa: ANN401 - redis-py types its commands for both of its clients
        self._running = running
        self._redis = redis
        self._derived = derived
        self._kept: dict[bytes, bytes] = {}
        self.entries = 0
        """What is to be applied: changes times the handlers that get each."""

    async def fill(
        self,
        changes: int,
        *,
        insert: str = INSERT,
        each: int = 1,
        at_once: int = _AT_ONCE,
        seconds: float = _FILL_SECONDS,
    ) -> None:
        """Write rows, have the listener read them, and keep aside what it wrote.

        Args:
            changes: rows to be written.
            insert: writes those from the first to the second of its parameters.
            each: how many handlers get a change.
            at_once: rows of a commit.
            seconds: after which it has failed.
        """
        running = self._running
        self.entries = changes * each
        listener = await running.listener()
        url = await health(listener)
        for start in range(0, changes, at_once):
            await running.db.execute(insert, start, min(start + at_once, changes) - 1)
        deadline = time.monotonic() + seconds
        while (found := await asyncio.to_thread(_queued, url)) < self.entries:
            if listener.ended:
                raise listener.explained()
            if time.monotonic() > deadline:
                raise DemoError(f"after {seconds:.0f} s {found} entries are queued, not {self.entries}")
            await asyncio.sleep(_LOOK_SECONDS)
        await running.end(listener)
        generation = await running.db.fetchval("select generation from tailrace.source")
        async for key in self._redis.scan_iter(f"{QUEUE}:{generation}:*", count=1000):
            self._kept[key] = await self._redis.dump(key)
        await running.db.execute("drop table if exists lanes_kept")
        await running.db.execute("create table lanes_kept as table tailrace.lanes")

    async def reset(self) -> None:
        """Empty lanes and derived rows, as if nothing had been applied."""
        await self._redis.flushall()
        await self._running.db.execute(f"truncate {self._derived}")
        for statement in _RESET.split(";"):
            await self._running.db.execute(statement)

    async def restore(self) -> None:
        """Put all entries into Redis."""
        waiting = list(self._kept.items())
        while waiting:
            size = 0
            async with self._redis.pipeline(transaction=True) as pipe:
                while waiting and size < _RESTORED_BYTES:
                    key, value = waiting.pop()
                    size += len(value)
                    pipe.restore(key, 0, value)
                await pipe.execute()

    async def drained(self, workers: int, *, seconds: float) -> float:
        """Start workers on empty lanes, let the backlog go, wait for its end; returns changes a second.

        The rate is taken from a first look at a moment at which work had begun to the last commit, so that it
        is right for any kind of handler and leaves the start out.
        """
        looks = await self.watched(workers, seconds=seconds)
        (began, first), (ended, last) = looks[0], looks[-1]
        if ended <= began or first >= last:
            raise DemoError(f"a backlog of {self.entries} is too small to be measured")
        return (last - first) / (ended - began)

    async def watched(self, workers: int, *, seconds: float) -> list[tuple[float, int]]:
        """Do so, and return times with how much was applied then: the last is that of the last commit."""
        running = self._running
        await self.reset()
        children = await running.workers(workers)
        looks = list[tuple[float, int]]()
        deadline = time.monotonic() + seconds
        try:
            await self.restore()
            while True:
                at, applied = await running.db.fetchrow(_PROGRESS)
                if applied:
                    looks.append((at, applied))
                if applied >= self.entries:
                    break
                for child in children:
                    if child.ended:
                        raise child.explained()
                if time.monotonic() > deadline:
                    raise DemoError(f"after {seconds:.0f} s {applied} of {self.entries} are applied")
                await asyncio.sleep(_FIRST_LOOK_SECONDS if not applied else _NEXT_LOOK_SECONDS)
        finally:
            await running.end(*children)
        looks[-1] = (await running.db.fetchval(_LAST_COMMIT), looks[-1][1])
        return looks


async def health(listener: Child) -> str:
    """Return the address of the listener's health server."""
    return await listener.said(
        lambda line: str(line["url"]) if line.get("message") == "health of the listener" else None
    )


def open_redis(url: str) -> Any:  # noqa: ANN401 - as above
    """Open Redis with commands that are not typed for its other client."""
    return Redis.from_url(url)


def _queued(url: str) -> int:
    with urllib.request.urlopen(f"{url}/status", timeout=30) as answer:  # noqa: S310 - our own listener on loopback
        handlers = json.load(answer)["handlers"]
    return sum(int(handler["queued"]) for handler in handlers.values())
