"""The listener's end of the lanes: one generation, one token, one order of batches.

Keys, and what they mean, are told in lanes.py.
"""

from collections.abc import Collection, Mapping

import msgspec

from worker.change import Position
from worker.lanes import (
    NOTHING,
    QUEUED_MS,
    Backlog,
    Content,
    Entry,
    Lane,
    Lanes,
    LanesLostError,
    LeaseLostError,
    Top,
)

LEFT_OVER_SECONDS = 86_400
"""Lanes of an old generation are kept for a day, for people who want to look."""

_encode = msgspec.msgpack.Encoder().encode


class LaneWriter:
    """The listener's end of the lanes: one generation, one token, one order of batches."""

    def __init__(self, lanes: Lanes, generation: str, token: str, floor: Position) -> None:
        self._lanes = lanes
        self.generation = generation
        self._token = token
        self._floor = str(floor)
        self._last = self._floor
        self._tops: dict[Lane, Top] = {}
        self._staged: list[str | bytes] = []
        self._touched: dict[Lane, Top] = {}
        self._newest = self._floor

    @property
    def meta(self) -> str:
        """Name of the hash that says who may write."""
        return f"{self._lanes.base(self.generation)}:meta"

    async def begin(self) -> None:
        """Start the generation in Redis."""
        async with self._lanes.redis.pipeline(transaction=True) as pipe:
            pipe.delete(self.meta)
            pipe.hset(self.meta, mapping={"token": self._token, "last": self._floor})
            await pipe.execute()

    async def take_over(self) -> bool:
        """Go on where an earlier listener of this generation ended; False where Redis has lost it."""
        last = await self._lanes.take_over_script(keys=[self.meta], args=[self._token])
        if last is None:
            return False
        self._last = self._newest = last.decode()
        self._tops = await self._lanes.tops(self.generation)
        return True

    async def forget_all_but(self, handlers: Collection[str]) -> None:
        """Drop the lanes of handlers that are gone: nobody drains them, and they would fill Redis."""
        gone = [lane for lane in self._tops if lane.handler not in handlers]
        if not gone:
            return
        base = self._lanes.base(self.generation)
        names = [str(lane) for lane in gone]
        async with self._lanes.redis.pipeline(transaction=True) as pipe:
            pipe.delete(*(self._lanes.key(self.generation, lane) for lane in gone))
            pipe.hdel(f"{base}:tops", *names)
            pipe.hdel(f"{base}:passed", *names)
            pipe.hdel(self._lanes.claims, *names)
            await pipe.execute()
        for lane in gone:
            del self._tops[lane]

    @property
    def last(self) -> Position:
        """Position of the last entry that is surely in Redis."""
        return Position.parse(self._last)

    async def check(self) -> None:
        """See whether Redis still has the generation.

        Raises:
            LanesLostError: it does not.
            LeaseLostError: another listener writes it.
        """
        found = await self._lanes.raw("HMGET", self.meta, "token", "last")
        self._judge(found[0], found[1])

    def _judge(self, token: bytes | None, last: bytes | None) -> None:
        if token is None or last is None:
            raise LanesLostError("Redis has lost the lanes (flushed, evicted or replaced)")
        if token.decode() != self._token:
            raise LeaseLostError("another listener has taken over")
        if last.decode() not in (self._last, self._newest):
            raise LanesLostError("Redis holds an older copy of the lanes")

    def stage(self, lane: Lane, position: Position, content: Content) -> None:
        """Put an entry into the batch that the next flush writes."""
        before = self._touched.get(lane) or self._tops.get(lane) or Top(self._floor, 0, 0)
        size = before.size + len(content.payload) + content.stored + sum(map(len, content.keys)) + 64
        total = before.changes + content.changes
        entry = Entry(
            before.last,
            content.lanes,
            content.keys,
            content.source,
            content.payload,
            before.entries + 1,
            size,
            content.at,
            content.xid,
            content.changes,
            total,
            content.stored,
        )
        id_ = str(position)
        self._touched[lane] = Top(id_, entry.count, size, total)
        self._staged += (str(lane), id_, _encode(entry))
        self._newest = id_

    def unstage(self) -> None:
        """Forget the batch; its entries will be staged again."""
        self._staged, self._touched = [], {}
        # Not `_newest`: a batch whose fate is unknown may have arrived, and is then found by its last id.

    @property
    def tops(self) -> Mapping[Lane, Top]:
        """The last entry of every lane."""
        return self._tops

    async def flush(self) -> list[Lane]:
        """Write the batch; return the lanes that need an arq job.

        Safe to call again after a lost connection: a batch that had arrived is not written twice.

        Raises:
            LanesLostError: Redis is not what it was; nothing was written.
            LeaseLostError: another listener writes; nothing was written.
        """
        if not self._staged:
            return []
        lanes = self._lanes
        tops: list[str] = []
        for lane, top in self._touched.items():
            tops += (str(lane), f"{top.last} {top.entries} {top.size} {top.changes}")
        arguments: list[str | bytes | int] = [
            lanes.base(self.generation),
            lanes.prefix,
            QUEUED_MS,
            self._token,
            self._last,
            self._newest,
            *self._staged,
            _encode(tops),
        ]
        answer = await lanes.add_script(keys=[lanes.claims], args=arguments)
        if answer[0] == b"token":
            self._judge(answer[1] or None, self._last.encode())
        if answer[0] == b"last" and answer[1].decode() != self._newest:
            raise LanesLostError("Redis holds an older copy of the lanes")
        cold = [Lane.parse(name.decode()) for name in answer[1]] if answer[0] == b"added" else []
        self._tops |= self._touched
        self._last = self._newest
        self._staged, self._touched = [], {}
        return cold

    async def backlogs(self) -> dict[Lane, Backlog]:
        """Count, for every lane, what is written and not yet applied."""
        passed = await self._lanes.passed(self.generation)
        return {lane: top.above(passed.get(lane)) for lane, top in self._tops.items()}

    async def backlog(self) -> Backlog:
        """Count what is written and not yet applied."""
        return sum((await self.backlogs()).values(), NOTHING)

    async def retire(self, generation: str, *, keep: bool = True) -> None:
        """Let the lanes of an old generation go: in a day, or at once where their source has it all."""
        base = self._lanes.base(generation)
        async for key in self._lanes.redis.scan_iter(f"{base}:*", count=1000):
            if keep:
                await self._lanes.redis.expire(key, LEFT_OVER_SECONDS)
            else:
                await self._lanes.redis.unlink(key)
