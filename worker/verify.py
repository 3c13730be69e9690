"""Counts again, from the slot, Redis and Postgres, what the counters say: `status --verify`.

Every commit that the slot still keeps is decoded once more from a copy of the slot, routed as the listener
routes it, and looked for: it must be below its lane's position or stand in its lane. Changes nothing; the
copy of the slot is dropped again.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from msgspec.structs import replace
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from config.settings import Settings
from worker import payloads, positions
from worker.catalogue import Catalogue
from worker.change import Position, RawChange
from worker.database import explain, make_engine
from worker.lanes import Lane, Lanes, Read
from worker.paging import Givers
from worker.queue import connection_pool
from worker.registry import Handler
from worker.routing import Router
from worker.wal.failures import WalError
from worker.wal.slot import as_text, copy_slot, drop_slot, read_server, read_slot
from worker.wal.type_names import TypeNames
from worker.wal.windows import WindowReader

PAGE = 1_000
TRIES = 5
"""Looks, where the listener begins a new generation in the midst of one."""
MOST_NAMED = 20

_COUNTERS = text(
    "select h.name, coalesce(l.read, 0)::bigint, coalesce(l.applied, 0)::bigint,"
    " coalesce(w.changes, 0)::bigint"
    " from tailrace.handlers h"
    " left join (select handler, sum(read) as read, sum(applied) as applied from tailrace.lanes"
    "  group by handler) l on l.handler = h.name"
    " left join (select handler, sum(changes) as changes from tailrace.held group by handler) w"
    "  on w.handler = h.name"
)
_ROWS = text(
    "select l.handler, l.lane from tailrace.lanes l where l.holding <> (select count(*) from tailrace.held h"
    "  where h.handler = l.handler and h.waits and (l.lane = any(h.lanes)))"
    " or l.parked <> (select count(*) from tailrace.held h"
    "  where h.handler = l.handler and h.status = 'parked' and h.lanes[1] = l.lane)"
)


@dataclass
class Recount:
    """What was found."""

    problems: list[str] = field(default_factory=list)
    """In words; empty where everything is accounted for."""
    notes: list[str] = field(default_factory=list)
    """What was not looked at, and why."""
    handlers: dict[str, dict[str, int]] = field(default_factory=dict)
    """By handler: `queued` (entries in Redis above the positions), `unread` (changes in the slot that the
    listener has not written yet), `missing` and `phantom`."""
    log: dict[str, Any] | None = None
    """The part of the log that was decoded: `from`, `to` (LSNs) and `changes`."""

    def told(self) -> dict[str, Any]:
        """Give it as JSON can have it."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "handlers": self.handlers,
            "log": self.log,
        }


class _Log(NamedTuple):
    """What the slot keeps, routed."""

    start: int
    end: int
    changes: int
    lanes: Mapping[Lane, set[Position]]
    """Where each change must be found, unless its lane has passed it."""


class _Look(NamedTuple):
    """Redis and Postgres, one after the other, under one generation."""

    generation: str
    written: Position
    """The last entry that was written in any lane."""
    entries: Mapping[Lane, Sequence[Read]]
    stored: set[tuple[str, Position]]
    """Payloads in Postgres, by handler; read after the entries and before what is passed."""
    passed: Mapping[Lane, Position]
    """Read after the entries: an entry that was trimmed before is below its position now."""
    floor: Position


async def verify(
    settings: Settings,
    handlers: Sequence[Handler],
    catalogue: Catalogue,
    progress: Callable[[int, int], None] | None = None,
) -> Recount:
    """Count again.

    Args:
        settings: where all is.
        handlers: as loaded.
        catalogue: of their tables.
        progress: is told how many bytes of the log are decoded, of how many.

    Raises:
        sqlalchemy.exc.DBAPIError, OSError: Postgres is away.
    """
    engine = make_engine(settings.database_url.get_secret_value(), name="tailrace verify", size=3)
    redis: Redis = Redis(connection_pool=connection_pool(settings.redis_url.get_secret_value(), retries=0))
    try:
        one = _Verification(settings, engine, Lanes(redis, settings.queue), handlers, catalogue, progress)
        try:
            return await one.run()
        except RedisError as error:
            one.found.problems.append(f"Redis cannot be read ({type(error).__name__}): check REDIS_URL")
            return one.found
    finally:
        await redis.aclose(close_connection_pool=True)
        await engine.dispose()


class _Verification:
    def __init__(
        self,
        settings: Settings,
        engine: AsyncEngine,
        lanes: Lanes,
        handlers: Sequence[Handler],
        catalogue: Catalogue,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._progress = progress
        self._settings = settings
        self._engine = engine
        self._lanes = lanes
        self._handlers = handlers
        self._catalogue = catalogue
        self.found = Recount()

    async def run(self) -> Recount:
        """Count again; see `verify`."""
        found = self.found
        await self._counters()
        async with self._engine.connect() as connection:
            source = await positions.read_source(connection)
        if source.generation is None:
            found.notes.append("no listener has run yet: there is nothing to compare")
            return found
        log = None
        if source.delivery == "proven":
            log = await self._read_log(source.lanes or 1)
        else:
            found.notes.append("plain delivery: Realtime keeps nothing to compare with")
        look = await self._look()
        if look is None:
            found.problems.append("the listener begins one generation after another: see its log")
            return found
        self._compare(look, log)
        return found

    async def _counters(self) -> None:
        """Compare the counters with each other, and with the rows they count."""
        async with self._engine.connect() as connection:
            await connection.execution_options(isolation_level="REPEATABLE READ")
            for name, read, applied, waiting in await connection.execute(_COUNTERS):
                if read != applied + waiting:
                    self.found.problems.append(
                        f"{name}: {read} changes were read, but {applied} applied and {waiting} are held,"
                        " parked or dead"
                    )
            for handler, lane in await connection.execute(_ROWS):
                self.found.problems.append(
                    f"{handler}: lane {lane} counts other held rows than tailrace.held has"
                )

    # The slot

    async def _read_log(self, lanes: int) -> _Log | None:
        """Decode all that the slot keeps, from a copy of it."""
        name = self._settings.slot
        copy = f"{name[:50]}_verify"
        async with self._engine.connect() as connection:
            if await read_slot(connection, name) is None:
                self.found.problems.append(f'the replication slot "{name}" does not exist')
                return None
            try:
                await drop_slot(connection, copy)  # of one that was killed
                start = await copy_slot(connection, name, copy)
            except DBAPIError as error:
                self.found.problems.append(f"the slot cannot be copied: {explain(error)}")
                return None
            end = (await read_server(connection)).flushed
            await connection.rollback()
            try:
                return await self._decode(copy, start, end, lanes)
            except WalError as error:
                self.found.problems.append(f"the log cannot be read: {error}")
                return None
            finally:
                await connection.rollback()
                await drop_slot(connection, copy)

    async def _decode(self, slot: str, start: int, end: int, lanes: int) -> _Log:
        router = Router(self._handlers, self._catalogue, lanes)
        reader = WindowReader(
            self._engine, slot=slot, publication=self._settings.publication, names=TypeNames(self._engine)
        )
        routed: dict[Lane, set[Position]] = defaultdict(set)
        givers = Givers(self._engine)
        changes = 0
        if start < end:
            async with aclosing(reader.read()) as batches:  # type: ignore[type-var] # an async generator
                async for batch in batches:
                    for position, raw in batch.changes:
                        if raw.given is not None and not await givers.have_given(raw.given):
                            continue
                        changes += self._route(router, position, raw, routed)
                    if self._progress is not None:
                        self._progress(min(batch.read_to, end) - start, end - start)
                    if batch.read_to >= end and not batch.open:
                        break
        self.found.log = {"from": as_text(start), "to": as_text(end), "changes": changes}
        return _Log(start, end, changes, routed)

    def _route(
        self, router: Router, position: Position, raw: RawChange, routed: dict[Lane, set[Position]]
    ) -> int:
        if (raw.schema, raw.table) not in router.tables:
            return 0
        for one in router.route(raw).matched:
            for number in set(one.lanes):
                routed[Lane(one.handler.name, number)].add(position)
        return 1

    # Redis, then Postgres

    async def _look(self) -> _Look | None:
        for _ in range(TRIES):
            before = await self._source()
            generation = str(before.generation)
            found = await self._lanes.raw("HGET", f"{self._lanes.base(generation)}:meta", "last")
            written = before.floor if found is None else Position.parse(found.decode())
            at = await positions.of_all(self._engine)
            entries = {
                lane: await self._entries(generation, lane, at.get(lane, Position.ZERO))
                for lane in await self._lanes.tops(generation)
            }
            async with self._engine.connect() as connection:
                stored = await payloads.stored(connection, generation)
            passed = await positions.of_all(self._engine)
            if (await self._source()).generation == before.generation:
                return _Look(generation, written, entries, stored, passed, before.floor)
        return None

    async def _source(self) -> positions.SourceRow:
        async with self._engine.connect() as connection:
            return await positions.read_source(connection)

    async def _entries(self, generation: str, lane: Lane, after: Position) -> list[Read]:
        reads: list[Read] = []
        while page := (await self._lanes.read(generation, lane, after, PAGE)).reads:
            after = page[-1].position
            # Payloads are not kept: a backlog may be larger than memory should be.
            reads += [Read(position, replace(entry, keys=(), payload=b"")) for position, entry in page]
        return reads

    def _compare(self, look: _Look, log: _Log | None) -> None:
        queued: Counter[str] = Counter()
        unread: Counter[str] = Counter()
        missing: dict[str, list[Position]] = defaultdict(list)
        phantom: dict[str, list[Position]] = defaultdict(list)
        for lane, reads in look.entries.items():
            passed = look.passed.get(lane, Position.ZERO)
            above = [read for read in reads if read.position > passed]
            queued[lane.handler] += sum(read.entry.changes for read in above)
            self._chain(lane, above, passed, look.floor)
            bare = [at for at, entry in above if entry.stored and (lane.handler, at) not in look.stored]
            self._name(lane.handler, bare, "are in a lane, but their payloads are not in tailrace.payloads")
            if log is not None:
                phantom[lane.handler] += _not_in_log(lane, above, log)
        for lane, expected in log.lanes.items() if log is not None else ():
            passed = look.passed.get(lane, Position.ZERO)
            there = {read.position for read in look.entries.get(lane, ())}
            for position in expected:
                if position <= passed or position in there:
                    continue
                if position > look.written:
                    unread[lane.handler] += 1
                else:
                    missing[lane.handler].append(position)
        for handler in self._handlers:
            name = handler.name
            self.found.handlers[name] = {
                "queued": queued[name],
                "unread": unread[name],
                "missing": len(missing[name]),
                "phantom": len(phantom[name]),
            }
            self._name(name, missing[name], "are in the log, but neither applied nor in a lane")
            self._name(name, phantom[name], "are in a lane, but not in the log")

    def _chain(self, lane: Lane, reads: Sequence[Read], passed: Position, floor: Position) -> None:
        before = passed
        for read in reads:
            previous = read.entry.previous
            if previous != str(floor) and Position.parse(previous) > before:
                self.found.problems.append(
                    f"{lane.handler}: lane {lane.number} has a hole before {read.position}"
                )
                return
            before = read.position

    def _name(self, handler: str, places: Sequence[Position], what: str) -> None:
        if places:
            named = ", ".join(f"{as_text(one.lsn)}-{one.ordinal}" for one in sorted(places)[:MOST_NAMED])
            more = f" and {len(places) - MOST_NAMED} more" if len(places) > MOST_NAMED else ""
            self.found.problems.append(f"{handler}: {len(places)} changes {what}: {named}{more}")


def _not_in_log(lane: Lane, reads: Sequence[Read], log: _Log) -> list[Position]:
    expected = log.lanes.get(lane, set())
    return [
        position
        for position, entry in reads
        if entry.source == "wal" and log.start <= position.lsn < log.end and position not in expected
    ]


__all__ = ["Recount", "verify"]
