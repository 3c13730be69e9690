"""Lanes in Redis: streams whose entry ids are positions, and the hints that wake a worker for them.

A lane is what is on its way to one handler, in order; nothing in it is evidence that a change was handled
(that stands in Postgres, see positions.py), and all that is lost here is found out: every entry names the
one before it, and every batch of entries the batch before it.

Keys, all below the prefix `WORKER_QUEUE`:

    {prefix}:{generation}:lane:{handler}:{n}   stream: id = position, field `e` = Entry as MessagePack
    {prefix}:{generation}:meta                 hash: token of the lease that may write, last id written
    {prefix}:{generation}:tops                 hash: lane -> "id count bytes" of its last entry
    {prefix}:{generation}:passed               hash: lane -> "count bytes" up to which it is applied
    {prefix}:claims                            hash: lane -> worker that drains it, or `queued:<ms>`
    {prefix}:worker:{id}                       key with a time to live: this worker is alive
    {prefix}:bell:{id}, {prefix}:jobs          pub/sub: a lane of this worker has news; arq's queue has a job
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from worker import lane_scripts
from worker.change import Position

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

LEFT_OVER_SECONDS = 86_400
"""Lanes of an old generation are kept for a day, for people who want to look."""
CLAIM_SECONDS = 5
"""A worker that has not renewed its key for so long is dead; its lanes are anybody's."""
QUEUED_MS = 2_000
"""A wake-up job that has not started by then is taken for lost."""


AT_ONCE = 100
"""Entries asked for in one command."""
MOST_BYTES = 8 * 1024 * 1024
"""Entries of so many bytes are enough for one pass; a change of Realtime may have a megabyte."""


class Lane(NamedTuple):
    """One serial order of one handler."""

    handler: str
    number: int

    def __str__(self) -> str:
        """As it is named in Redis."""
        return f"{self.handler}:{self.number}"

    @classmethod
    def parse(cls, name: str) -> "Lane":
        """Read the name back; handler names contain colons themselves."""
        handler, _, number = name.rpartition(":")
        return cls(handler, int(number))


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """What stands in a lane for one change."""

    previous: str
    """Id of the lane's entry before this one; the generation's floor for the first."""
    lanes: tuple[int, ...]
    """All lanes of the handler to which the change belongs; nearly always one."""
    keys: tuple[bytes, ...]
    """Lane keys: for a change handler all of them, for a derive handler those of this lane."""
    source: str
    payload: bytes
    """The change as its source wrote it; empty for derive handlers, which need the keys alone."""
    count: int
    """Entries of this lane in this generation, this one included."""
    size: int
    """Their bytes."""
    at: float
    """When the listener had it, in seconds since 1970."""
    xid: int | None = None
    """The transaction's id (32 bits), where the source tells it: applied only once it is visible."""
    changes: int = 1
    """For how many changes it counts: 0 where another lane of the handler counts the change."""


class Content(NamedTuple):
    """What an entry carries; its fields are those of Entry."""

    lanes: tuple[int, ...]
    keys: tuple[bytes, ...]
    source: str
    payload: bytes
    at: float
    xid: int | None = None
    changes: int = 1


class Read(NamedTuple):
    """An entry with its position."""

    position: Position
    entry: Entry


class LanesLostError(Exception):
    """Redis no longer has what was written: flushed, evicted, or an older copy of itself."""


class LeaseLostError(Exception):
    """Another listener writes these lanes now."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(Entry)


class Top(NamedTuple):
    """The last entry of a lane, as its writer remembers it."""

    last: str
    entries: int
    size: int


class Backlog(NamedTuple):
    """What has been written and is not yet applied."""

    entries: int
    size: int


class Lanes:
    """The lanes of one generation, as workers and listener share them."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.redis = redis
        self.prefix = prefix
        script = redis.register_script
        self._add: AsyncScript = script(lane_scripts.ADD)
        self._ring: AsyncScript = script(lane_scripts.RING)
        self._sweep: AsyncScript = script(lane_scripts.SWEEP)
        self._claim: AsyncScript = script(lane_scripts.CLAIM)
        self._release: AsyncScript = script(lane_scripts.RELEASE)
        self._take_over: AsyncScript = script(lane_scripts.TAKE_OVER)

    def base(self, generation: str) -> str:
        """Name what all keys of a generation begin with."""
        return f"{self.prefix}:{generation}"

    def key(self, generation: str, lane: Lane) -> str:
        """Name the stream of a lane."""
        return f"{self.prefix}:{generation}:lane:{lane}"

    async def raw(self, *command: str) -> Any:  # noqa: ANN401 - whatever Redis answers
        """Send a command; redis-py's own methods for hashes are typed for its synchronous client too."""
        return await self.redis.execute_command(*command)  # type: ignore[no-untyped-call] # redis-py's own

    @property
    def claims(self) -> str:
        """Name of the hash of claims."""
        return f"{self.prefix}:claims"

    # Reading and trimming, for workers

    async def read(self, generation: str, lane: Lane, after: Position, most: int) -> list[Read]:
        """Read entries above a position: at most so many, and not much more than MOST_BYTES."""
        reads: list[Read] = []
        size = 0
        while len(reads) < most and size < MOST_BYTES:
            start = _above(reads[-1].position if reads else after)
            count = min(AT_ONCE, most - len(reads))
            found = await self.redis.xrange(self.key(generation, lane), start, "+", count)
            for id_, fields in found:
                reads.append(Read(Position.parse(id_.decode()), _DECODER.decode(fields[b"e"])))
                size += len(fields[b"e"])
            if len(found) < count:
                break
        return reads

    async def trim(self, generation: str, lane: Lane, last: Read) -> None:
        """Forget what Postgres says is applied: the entries up to `last`."""
        await self._pass(generation, lane, last.position, f"{last.entry.count} {last.entry.size}")

    async def _pass(self, generation: str, lane: Lane, position: Position, passed: str) -> None:
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.xtrim(self.key(generation, lane), minid=_above(position), approximate=False)
            pipe.hset(f"{self.base(generation)}:passed", str(lane), passed)
            await pipe.execute()

    async def pass_over(self, generation: str, lane: Lane, position: Position) -> None:
        """Say that a lane holds nothing above its position, after a look found it empty.

        Only where its last entry is applied: one that came meanwhile, or that Redis lost, keeps it active.
        """
        base = self.base(generation)
        found = await self.raw("HGET", f"{base}:tops", str(lane))
        if found is None:
            return
        top = _top(found)
        if Position.parse(top.last) <= position:
            await self._pass(generation, lane, position, f"{top.entries} {top.size}")

    # Claims and wake-ups

    async def claim(self, lane: Lane, worker: str) -> bool:
        """Take a lane for a worker; False where a living one has it."""
        return bool(await self._claim(keys=[self.claims], args=[str(lane), self.prefix, worker]))

    async def release(self, generation: str, lane: Lane, worker: str, *, always: bool = False) -> bool:
        """Give a lane back; False, and nothing done, where entries have come meanwhile."""
        arguments = [str(lane), worker, self.base(generation), "1" if always else "0"]
        return bool(await self._release(keys=[self.claims], args=arguments))

    async def alive(self, worker: str) -> None:
        """Say that a worker lives."""
        await self.redis.set(f"{self.prefix}:worker:{worker}", b"1", ex=CLAIM_SECONDS)

    async def gone(self, worker: str) -> None:
        """Say that a worker has left."""
        await self.redis.delete(f"{self.prefix}:worker:{worker}")

    async def workers(self) -> list[str]:
        """List the living workers."""
        start = f"{self.prefix}:worker:"
        return sorted([key.decode()[len(start) :] async for key in self.redis.scan_iter(f"{start}*")])

    async def ring(self, lanes: Iterable[Lane]) -> list[Lane]:
        """Wake whoever drains these lanes; return those that need an arq job."""
        names = [str(lane) for lane in lanes]
        if not names:
            return []
        arguments = [*self._arguments(""), _ENCODER.encode(names)]
        return [Lane.parse(name.decode()) for name in await self._ring(keys=[self.claims], args=arguments)]

    async def sweep(self, generation: str) -> list[Lane]:
        """Find lanes with work that nobody drains, and wake who should; return those that need a job."""
        arguments = self._arguments(generation)
        return [Lane.parse(name.decode()) for name in await self._sweep(keys=[self.claims], args=arguments)]

    def _arguments(self, generation: str) -> list[str | int]:
        return [self.base(generation), self.prefix, QUEUED_MS]

    # What is under way

    async def tops(self, generation: str) -> dict[Lane, Top]:
        """Read the last entry of every lane written in this generation."""
        found = await self.raw("HGETALL", f"{self.base(generation)}:tops")
        return {Lane.parse(name.decode()): _top(value) for name, value in found.items()}

    async def missing(self, generation: str, ends: Sequence[tuple[Lane, str]]) -> list[tuple[Lane, str]]:
        """Find the lanes in which the entry of this id, the last one written, does not stand."""
        async with self.redis.pipeline(transaction=False) as pipe:
            for lane, last in ends:
                pipe.xrange(self.key(generation, lane), last, last)
            found = await pipe.execute()
        return [end for end, entries in zip(ends, found, strict=True) if not entries]

    async def passed(self, generation: str) -> dict[Lane, Backlog]:
        """Read, for every lane, how many entries and bytes are applied."""
        found = await self.raw("HGETALL", f"{self.base(generation)}:passed")
        return {Lane.parse(name.decode()): Backlog(*map(int, value.split())) for name, value in found.items()}


def _above(position: Position) -> str:
    return f"{position.lsn}-{position.ordinal + 1}"


def _top(value: bytes) -> Top:
    last, count, size = value.decode().split()
    return Top(last, int(count), int(size))


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
        last = await self._lanes._take_over(keys=[self.meta], args=[self._token])  # noqa: SLF001 - as in flush
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
        size = before.size + len(content.payload) + sum(map(len, content.keys)) + 64
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
        )
        id_ = str(position)
        self._touched[lane] = Top(id_, entry.count, size)
        self._staged += (str(lane), id_, _ENCODER.encode(entry))
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
            tops += (str(lane), f"{top.last} {top.entries} {top.size}")
        arguments: list[str | bytes | int] = [
            lanes.base(self.generation),
            lanes.prefix,
            QUEUED_MS,
            self._token,
            self._last,
            self._newest,
            *self._staged,
            _ENCODER.encode(tops),
        ]
        answer = await lanes._add(keys=[lanes.claims], args=arguments)  # noqa: SLF001 - the two halves of one mechanism
        if answer[0] == b"token":
            self._judge(answer[1] or None, self._last.encode())
        if answer[0] == b"last" and answer[1].decode() != self._newest:
            raise LanesLostError("Redis holds an older copy of the lanes")
        cold = [Lane.parse(name.decode()) for name in answer[1]] if answer[0] == b"added" else []
        self._tops |= self._touched
        self._last = self._newest
        self._staged, self._touched = [], {}
        return cold

    async def backlog(self) -> Backlog:
        """Count the entries and bytes that are written and not yet applied."""
        passed = await self._lanes.passed(self.generation)
        entries = size = 0
        for lane, top in self._tops.items():
            done = passed.get(lane, Backlog(0, 0))
            entries += max(0, top.entries - done.entries)
            size += max(0, top.size - done.size)
        return Backlog(entries, size)

    async def retire(self, generation: str, *, keep: bool = True) -> None:
        """Let the lanes of an old generation go: in a day, or at once where their source has it all."""
        base = self._lanes.base(generation)
        async for key in self._lanes.redis.scan_iter(f"{base}:*", count=1000):
            if keep:
                await self._lanes.redis.expire(key, LEFT_OVER_SECONDS)
            else:
                await self._lanes.redis.unlink(key)


def by_handler(lanes: Mapping[Lane, Backlog]) -> dict[str, Backlog]:
    """Add up lanes for each handler."""
    sums: dict[str, Backlog] = {}
    for lane, backlog in lanes.items():
        before = sums.get(lane.handler, Backlog(0, 0))
        sums[lane.handler] = Backlog(before.entries + backlog.entries, before.size + backlog.size)
    return sums
