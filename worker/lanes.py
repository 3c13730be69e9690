"""Lanes in Redis: streams whose entry ids are positions, and the hints that wake a worker for them.

A lane is what is on its way to one handler, in order; nothing in it is evidence that a change was handled
(that stands in Postgres, see positions.py), and all that is lost here is found out: every entry names the
one before it, and every batch of entries the batch before it.

Keys, all below the prefix `WORKER_QUEUE`:

    {prefix}:{generation}:lane:{handler}:{n}   stream: id = position, field `e` = Entry as MessagePack; where
                                               older versions must not apply it, another field
    {prefix}:{generation}:meta                 hash: token of the lease that may write, last id written
    {prefix}:{generation}:tops                 hash: lane -> "id count bytes changes" of its last entry
    {prefix}:{generation}:passed               hash: lane -> "count bytes changes" up to which it is applied
    {prefix}:{generation}:parking              hash: lane -> count of the entry up to which it is to be parked
    {prefix}:claims                            hash: lane -> worker that drains it, or `queued:<ms>`, then
                                               a `!` where the worker before has died
    {prefix}:loads                             hash: worker -> how much it has to do, see draining/balance.py
    {prefix}:reached                           up to where the log was read, see reading/reached.py
    {prefix}:calls                             hash: lane -> note of a call, see draining/notes.py
    {prefix}:worker:{id}                       key with a time to live: this worker is alive
    {prefix}:bell:{id}, {prefix}:jobs          pub/sub: lanes of this worker have news, and which,
                                               where that is little; arq's queue has a job
"""

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from worker import lane_scripts
from worker.change import Position
from worker.errors import NewerFormat

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

FORMAT = 1
"""Of positions and lanes as a whole, as `tailrace.source` names it.

A migration raises it, having locked `tailrace.lanes`, where a process of the version before would lose or
double something: such processes wait from then on. What a new name for the field of an entry can say needs no
new format; what may be overlooked needs neither, and is a new member at the end of Entry.
"""
UPGRADE = "which a newer version of Tailrace writes: upgrade this process"
CLAIM_SECONDS = 5
"""A worker that has not renewed its key for so long is dead; its lanes are anybody's."""
QUEUED_MS = 2_000
"""A wake-up job that has not started by then is taken for lost."""


FIRST = 8
"""Entries asked for at first, while nobody knows how wide those of a lane are."""
AT_ONCE = 200
"""Entries asked for in one command, however narrow those before were."""
READ_BYTES = 1024 * 1024
"""Entries of so many bytes are enough for one pass; a change of Realtime may have a megabyte.

A worker has them in memory several times over, as bytes, as values and as parameters, for each of the lanes
that it drains at a time.
"""
MOST_BYTES = 8 * 1024 * 1024
"""Payloads of so many bytes, of changes too large for Redis, are enough for one pass."""


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


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
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
    total: int = 0
    """Changes of this lane in this generation, these included."""
    stored: int = 0
    """Bytes of the payload where that is in Postgres instead; see payloads.py."""


class Content(NamedTuple):
    """What an entry carries; its fields are those of Entry."""

    lanes: tuple[int, ...]
    keys: tuple[bytes, ...]
    source: str
    payload: bytes
    at: float
    xid: int | None = None
    changes: int = 1
    stored: int = 0


class Read(NamedTuple):
    """An entry with its position."""

    position: Position
    entry: Entry


class LanesLostError(Exception):
    """Redis no longer has what was written: flushed, evicted, or an older copy of itself."""


class LeaseLostError(Exception):
    """Another listener writes these lanes now."""


_ENCODER = msgspec.msgpack.Encoder()
FORMATS: dict[bytes, Callable[[bytes], Entry]] = {b"e": msgspec.msgpack.Decoder(Entry).decode}
"""How an entry is read, by the name of its field. Members that are not known at its end are passed over."""


class Top(NamedTuple):
    """The last entry of a lane, as its writer remembers it."""

    last: str
    entries: int
    size: int
    changes: int = 0

    def above(self, passed: "Backlog | None") -> "Backlog":
        """Count what has been written above what is applied."""
        if passed is None:
            return Backlog(self.entries, self.size, self.changes)
        return Backlog(*(max(0, top - done) for top, done in zip(self[1:], passed, strict=True)))


class Backlog(NamedTuple):
    """What has been written and is not yet applied."""

    entries: int
    size: int
    changes: int = 0

    def __add__(self, other: object) -> "Backlog":
        """Add up two."""
        if not isinstance(other, Backlog):
            return NotImplemented
        return Backlog(*(mine + its for mine, its in zip(self, other, strict=True)))


NOTHING = Backlog(0, 0, 0)


class Claim(enum.IntEnum):
    """What came of asking for a lane."""

    REFUSED = 0
    """A living worker has it."""
    TAKEN = 1
    FROM_THE_DEAD = 2
    """Taken from a worker that has died over it."""


class News(NamedTuple):
    """What a bell has told of a lane: entries, as they stand in its stream."""

    base: str
    """Of the keys of their generation; see `Lanes.base`."""
    reads: "list[Read]"


class Found(NamedTuple):
    """What a lane holds above a position."""

    reads: "list[Read]"
    park_to: int
    """Count of the entry up to which the listener wants it parked; 0 where it does not."""
    more: bool
    """There may be more than was read."""


class Lanes:
    """The lanes of one generation, as workers and listener share them."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.redis = redis
        self._entries = Redis(connection_pool=redis.connection_pool)
        # redis-py would make a dict of the fields of each entry, which takes longer than to decode it.
        self._entries.set_response_callback("XRANGE", _as_answered)
        self.prefix = prefix
        self._widths: dict[Lane, int] = {}
        """Bytes of an entry, as they were read last."""
        script = redis.register_script
        self.add_script: AsyncScript = script(lane_scripts.ADD)
        self._ring: AsyncScript = script(lane_scripts.RING)
        self._sweep: AsyncScript = script(lane_scripts.SWEEP)
        self._claim: AsyncScript = script(lane_scripts.CLAIM)
        self._release: AsyncScript = script(lane_scripts.RELEASE)
        self._loads: AsyncScript = script(lane_scripts.LOADS)
        self._hand_over: AsyncScript = script(lane_scripts.HAND_OVER)
        self.take_over_script: AsyncScript = script(lane_scripts.TAKE_OVER)

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

    async def read(self, generation: str, lane: Lane, after: Position, most: int) -> Found:
        """Read entries above a position: at most so many, and not much more than READ_BYTES.

        Raises:
            NewerFormat: the first of them is one that only a newer version can read.
        """
        key = self.key(generation, lane)
        asked = min(self._fitting(lane, READ_BYTES), most)
        async with self._entries.pipeline(transaction=False) as pipe:
            pipe.hget(f"{self.base(generation)}:parking", str(lane))
            pipe.xrange(key, _above(after), "+", asked)
            park_to, found = await pipe.execute()
        reads: list[Read] = []
        size, more = 0, False
        while found:
            for id_, (name, content, *_) in found:
                if (decode := FORMATS.get(name)) is None:
                    return _up_to_newer(lane, reads, int(park_to or 0), name)
                reads.append(Read(Position.of_id(id_), decode(content)))
                size += len(content)
            self._widths[lane] = size // len(reads) + 1
            more = len(found) == asked
            if not more or len(reads) >= most or size >= READ_BYTES:
                break
            asked = min(self._fitting(lane, READ_BYTES - size), most - len(reads))
            found = await self._entries.xrange(key, _above(reads[-1].position), "+", asked)
        return Found(reads, int(park_to or 0), more)

    def _fitting(self, lane: Lane, size: int) -> int:
        """Tell how many entries fit, if they are as wide as those that were read last."""
        width = self._widths.get(lane)
        return FIRST if width is None else min(AT_ONCE, size // width + 1)

    async def trim(self, generation: str, lasts: "Mapping[Lane, Read]") -> None:
        """Forget what Postgres says is applied: the entries of each lane up to the last one."""
        passed = {}
        for lane, last in lasts.items():
            entry = last.entry
            passed[lane] = last.position, f"{entry.count} {entry.size} {entry.total}"
        await self._pass(generation, passed)

    async def _pass(self, generation: str, passed: Mapping[Lane, tuple[Position, str]]) -> None:
        async with self.redis.pipeline(transaction=False) as pipe:
            for lane, (position, _) in passed.items():
                pipe.xtrim(self.key(generation, lane), minid=_above(position), approximate=False)
            counts = {str(lane): counted for lane, (_, counted) in passed.items()}
            pipe.hset(f"{self.base(generation)}:passed", mapping=counts)
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
            counted = f"{top.entries} {top.size} {top.changes}"
            await self._pass(generation, {lane: (position, counted)})

    # Claims and wake-ups

    async def claim(self, lane: Lane, worker: str) -> Claim:
        """Take a lane for a worker."""
        return Claim(await self._claim(keys=[self.claims], args=[str(lane), self.prefix, worker]))

    async def noted(self, lane: Lane) -> bytes | None:
        """Read the note of a call; see draining/notes.py."""
        found: bytes | None = await self.raw("HGET", f"{self.prefix}:calls", str(lane))
        return found

    async def note(self, lane: Lane, note: bytes) -> None:
        """Note a call before it begins."""
        await self.redis.execute_command("HSET", f"{self.prefix}:calls", str(lane), note)  # type: ignore[no-untyped-call] # redis-py's own

    async def forget_note(self, lane: Lane) -> None:
        """Forget it: the call has ended."""
        await self.raw("HDEL", f"{self.prefix}:calls", str(lane))

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

    async def loads(self, worker: str, load: float) -> dict[str, float]:
        """Tell how much a worker has to do; hear it of all living ones, this one included."""
        found = await self._loads(keys=[f"{self.prefix}:loads"], args=[self.prefix, worker, f"{load:.3f}"])
        return {name.decode(): float(load) for name, load in zip(found[::2], found[1::2], strict=True)}

    async def hand_over(self, generation: str, lane: Lane, worker: str, to: str) -> bool:
        """Give a lane of one worker to another, which is told; False where that cannot be."""
        arguments = [*self._arguments(generation), str(lane), worker, to]
        return bool(await self._hand_over(keys=[self.claims], args=arguments))

    async def workers(self) -> list[str]:
        """List the living workers."""
        start = f"{self.prefix}:worker:"
        return sorted([key.decode()[len(start) :] async for key in self.redis.scan_iter(f"{start}*")])

    async def park(self, generation: str, lanes: Mapping[Lane, int]) -> list[Lane]:
        """Have lanes parked up to the entry of this count, and wake whoever drains them; see `ring`."""
        if not lanes:
            return []
        marks = [str(word) for one in lanes.items() for word in one]
        await self.raw("HSET", f"{self.base(generation)}:parking", *marks)
        return await self.ring(lanes)

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
        return {
            Lane.parse(name.decode()): Backlog(*map(int, value.split()[:3])) for name, value in found.items()
        }


def check_format(number: int) -> None:
    """See that this version understands positions and lanes.

    Raises:
        NewerFormat: it does not.
    """
    if number > FORMAT:
        raise NewerFormat(f"the lanes are of format {number}, {UPGRADE}")


def _up_to_newer(lane: Lane, reads: list[Read], park_to: int, name: bytes) -> Found:
    """Give what stands before an entry that cannot be read; nothing after it may be applied."""
    if reads:
        return Found(reads, park_to, more=True)
    raise NewerFormat(f"the next entry of {lane} is of format {name.decode(errors='replace')!r}, {UPGRADE}")


def heard(message: bytes) -> tuple[str, dict[Lane, list[Read]]]:
    """Read what a bell says: the base of a generation's keys, and lanes with the entries that it tells.

    A lane may come without any: then they are in its stream. The form is that of `wake` in lane_scripts.py.
    """
    head, _, body = message.partition(b"\n\n")
    first, *lines = head.decode().split("\n")
    base, _, name = first.partition("\t")
    decode = FORMATS.get(name.encode())
    lanes: dict[Lane, list[Read]] = {}
    at = 0
    for line in lines:
        lane, *told = line.split("\t")
        reads = lanes.setdefault(Lane.parse(lane), [])
        for id_, length in zip(told[::2], told[1::2], strict=True):
            end = at + int(length)
            if decode is not None:  # what only a newer version can read is left to the look into the stream
                reads.append(Read(Position.parse(id_), decode(body[at:end])))
            at = end
    return base, lanes


def _as_answered(response: Any, **_kwargs: Any) -> Any:  # noqa: ANN401 - whatever Redis answers
    return response


def _above(position: Position) -> str:
    return f"{position.lsn}-{position.ordinal + 1}"


def _top(value: bytes) -> Top:
    # A newer version may add to the end, here and in `passed`.
    last, *counts = value.decode().split()[:4]
    return Top(last, *map(int, counts))


def by_handler(lanes: Mapping[Lane, Backlog]) -> dict[str, Backlog]:
    """Add up lanes for each handler."""
    sums: dict[str, Backlog] = {}
    for lane, backlog in lanes.items():
        sums[lane.handler] = sums.get(lane.handler, NOTHING) + backlog
    return sums
