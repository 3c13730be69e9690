"""The rows that say up to where each lane is applied, and who reads the source.

One row a lane, locked by whoever drains it and moved in the handler's own transaction: that, and nothing
else, makes effects exactly-once. Nothing here decides what to apply.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from worker.change import Position
from worker.database import is_locked, singly
from worker.driver import run
from worker.lanes import Lane

WAIT_MS = 3_000
"""For the row of a lane that is being drained: about as long as a pass."""


class Limits(NamedTuple):
    """How long Postgres lets a drain's transaction live when its process does not answer."""

    idle_ms: int
    """Between two statements; a handler that waits for the outside world lives within it."""
    total_ms: int
    """From begin to commit; 0 for servers that know no such limit."""

    def texts(self) -> tuple[str, str | None]:
        """Give both as Postgres's settings have them."""
        return str(self.idle_ms), str(self.total_ms) if self.total_ms else None


class LaneRow(NamedTuple):
    """A lane as Postgres has it, locked."""

    position: Position
    arrived: Position | None
    holding: int
    """Rows of held changes that concern it, parked ones too."""
    parked: int
    """Parked rows that this lane is to apply."""


class Moved(NamedTuple):
    """By how much the counters of a lane change."""

    read: int = 0
    applied: int = 0
    holding: int = 0
    parked: int = 0


class Snapshot(NamedTuple):
    """Which transactions could be seen at one moment, as `pg_current_snapshot()` has it."""

    oldest: int
    """All below it had ended."""
    next: int
    """None from it on had begun."""
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> "Snapshot":
        """Read Postgres's form, `oldest:next:running,running`."""
        oldest, following, running = text.split(":")
        return cls(int(oldest), int(following), frozenset(map(int, running.split(",") if running else ())))

    def shows(self, xid: int) -> bool:
        """Tell whether a transaction (32-bit id) could be seen: what is of the future never could."""
        ahead = (xid - self.next) % _CIRCLE
        whole = self.next + ahead - _CIRCLE
        return ahead >= _CIRCLE // 2 and whole >= 0 and (whole < self.oldest or whole not in self.running)


class SourceRow(NamedTuple):
    """The generation whose lanes are to be read."""

    generation: str | None
    floor: Position
    lanes: int | None
    history: str
    delivery: str
    same_server: bool
    """False where Postgres is not what it was when the generation began (proven delivery alone)."""
    paused: bool
    """True where a person has paused the handler that was asked for."""
    has_dead: bool
    """True where that handler has dead letters."""
    snapshot: Snapshot | None
    """What could be seen after the lane was locked; None where none was."""
    format: int
    """Of positions and lanes; see `lanes.FORMAT`."""


_ROW = "lane, lsn, ordinal, arrived_lsn, arrived_ordinal, holding, parked"
_FROM = "from tailrace.lanes where handler = :handler and lane ="
_READ = f"select {_ROW} {_FROM}"
# A dead or frozen process must not keep the row: Postgres ends its transaction by itself (kernel answers
# keep-alives of a stopped process, and a killed one is noticed only when the statement it runs has ended).
_TAKE = "select * from tailrace.take_lane($1, $2, $3, $4)"
_TAKE_SEVERAL = "select * from tailrace.take_lanes($1, $2, $3, $4)"
_LOCK_OTHERS = text(f"{_READ} any (cast(:lanes as integer[])) order by lane for update skip locked")
_WAIT_FOR_OTHERS = text(f"{_READ} any (cast(:lanes as integer[])) order by lane for update")
_LOOK = text(f"{_READ} any (cast(:lanes as integer[]))")
# A restored database names a generation whose lanes hold transactions that no longer exist: its start time
# and timeline are not those under which the generation began.
_SOURCE = text(
    "select generation, floor_lsn, floor_ordinal, lanes, history, delivery,"
    " delivery = 'plain' or (server_started = pg_postmaster_start_time()"
    "  and timeline = (select timeline_id from pg_control_checkpoint())),"
    " false, false, null, format from tailrace.source"
)
_ALL = text("select handler, lane, lsn, ordinal from tailrace.lanes")
_CIRCLE = 2**32
# pgoutput tells 32 bits of a transaction id; what is less than half a circle ahead of now is of the future,
# and the future is never visible.
_VISIBLE = text(
    "with now as ("
    " select pg_current_snapshot() as snapshot,"
    "  cast(cast(pg_snapshot_xmax(pg_current_snapshot()) as text) as bigint) as next),"
    " ahead as ("
    " select x, mod(x - mod(next, 4294967296) + 4294967296, 4294967296) as by, now.*"
    " from unnest(cast(:xids as bigint[])) x, now)"
    " select x from ahead where by >= 2147483648 and next - (4294967296 - by) >= 0"
    " and pg_visible_in_snapshot(cast(cast(next - (4294967296 - by) as text) as xid8), snapshot)"
)
_ASK_REREAD = text(
    "update tailrace.source set reread = :cause where generation = :generation and reread is null"
    # A worker that is frozen before it commits must not keep the listener from its row.
    " returning set_config('idle_in_transaction_session_timeout', '5000', true)"
)
_MOVE = (
    "update tailrace.lanes set lsn = $3, ordinal = $4,"
    " arrived_lsn = case when lsn = $3 and ordinal = $4 then arrived_lsn end,"
    " arrived_ordinal = case when lsn = $3 and ordinal = $4 then arrived_ordinal end,"
    " read = read + $5, applied = applied + $6, holding = holding + $7, parked = parked + $8,"
    " moved_at = clock_timestamp() where handler = $1 and lane = $2"
)
_MOVE_SEVERAL = (
    "update tailrace.lanes l set lsn = m.lsn, ordinal = m.ordinal, arrived_lsn = null, arrived_ordinal = null"
    ", read = read + m.changes, applied = applied + m.changes, moved_at = clock_timestamp()"
    " from unnest($2::integer[], $3::bigint[], $4::bigint[], $5::bigint[]) m (lane, lsn, ordinal, changes)"
    " where l.handler = $1 and l.lane = m.lane"
)
_COUNT_WAITING = text(
    "update tailrace.lanes set holding = holding + :holding, parked = parked + :parked"
    " where handler = :handler and lane = :lane"
)
_ARRIVE = text(
    "update tailrace.lanes set arrived_lsn = :lsn, arrived_ordinal = :ordinal"
    " where handler = :handler and lane = :lane"
)


async def take(session: AsyncSession, lane: Lane, limits: Limits) -> tuple[LaneRow, SourceRow] | None:
    """Begin a drain's transaction: set its limits, take the lane's row, read the source's after that.

    Returns None where the lane is unknown. Nothing may be read before this and used after it: the
    transaction is READ COMMITTED, so what is read after the lock is what the last holder left.

    Raises:
        asyncpg.LockNotAvailableError: somebody else holds the row.
    """
    found = await run(session, _TAKE, lane.handler, lane.number, *limits.texts())
    return (_row(found[0]), _source(found[0][7:])) if found else None


async def take_several(
    session: AsyncSession, handler: str, lanes: Sequence[int], limits: Limits
) -> tuple[dict[int, LaneRow], SourceRow] | None:
    """Begin a transaction over several lanes, as `take` does: without those that somebody else holds.

    Returns None where there is none left.
    """
    found = await run(session, _TAKE_SEVERAL, handler, lanes, *limits.texts())
    return ({row[0]: _row(row) for row in found}, _source(found[0][7:])) if found else None


async def lock_others(session: AsyncSession, handler: str, lanes: Sequence[int]) -> dict[int, LaneRow]:
    """Take the rows of further lanes, without waiting: those that somebody else holds are left out."""
    return await _rows(session, _LOCK_OTHERS, handler, lanes)


async def wait_for_others(session: AsyncSession, handler: str, lanes: Sequence[int]) -> dict[int, LaneRow]:
    """Take the rows of all other lanes, waiting a little for each; none where one of them is not to be had.

    For what concerns every lane: they are hardly ever free at the same moment. No circle of such waits can
    form, for nobody else waits for a row while holding one, and the lowest lane alone waits here.
    """
    connection = await session.connection()
    before = (await connection.execute(text("show lock_timeout"))).scalar_one()
    try:
        async with session.begin_nested():
            await connection.execute(text(f"set local lock_timeout = {WAIT_MS}"))
            found = await _rows(session, _WAIT_FOR_OTHERS, handler, lanes)
            await connection.execute(
                text("select set_config('lock_timeout', :before, true)"), {"before": before}
            )
    except DBAPIError as error:
        if not is_locked(error):
            raise
        return {}
    return found


async def look(session: AsyncSession, handler: str, lanes: Sequence[int]) -> dict[int, LaneRow]:
    """Read rows without taking them: what is seen of a position may have grown since."""
    return await _rows(session, _LOOK, handler, lanes)


async def _rows(
    session: AsyncSession, statement: TextClause, handler: str, lanes: Sequence[int]
) -> dict[int, LaneRow]:
    connection = await session.connection()
    found = await connection.execute(statement, {"handler": handler, "lanes": list(lanes)})
    return {row[0]: _row(row) for row in found}


def _row(found: Any) -> LaneRow:  # noqa: ANN401 - a row of text(), which has no types
    arrived = None if found[3] is None else Position(found[3], found[4])
    return LaneRow(Position(found[1], found[2]), arrived, found[5], found[6])


async def read_source(connection: AsyncConnection | AsyncSession) -> SourceRow:
    """Read the generation in force, for no handler in particular; a pass reads it with its lane (`take`)."""
    return _source((await connection.execute(_SOURCE)).one())


def _source(row: Sequence[Any]) -> SourceRow:
    snapshot = None if row[9] is None else Snapshot.parse(row[9])
    return SourceRow(
        row[0],
        Position(row[1], row[2]),
        row[3],
        row[4],
        row[5],
        bool(row[6]),
        row[7],
        row[8],
        snapshot,
        row[10],
    )


async def visible(session: AsyncSession, xids: Iterable[int]) -> set[int]:
    """Find which of these transactions (32-bit ids) can be seen: a commit is decoded a little before that."""
    connection = await session.connection()
    return {row[0] for row in await connection.execute(_VISIBLE, {"xids": list(xids)})}


class Seen:
    """Transactions that were visible once, and so are for ever, within one generation.

    For all drains of a process: two handlers of a table come upon the same ones.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._generation = ""
        self._xids: dict[int, None] = {}

    async def visible(self, session: AsyncSession, generation: str, xids: set[int]) -> set[int]:
        """Find which of these transactions can be seen; see `visible`."""
        if generation != self._generation:
            # Another server, or another history of it, has other transactions of these numbers.
            self._generation, self._xids = generation, {}
        unknown = xids - self._xids.keys()
        if not unknown:
            return xids
        seen = await visible(session, unknown)
        if generation == self._generation:
            self._xids.update(dict.fromkeys(seen))
            while len(self._xids) > self._most:
                del self._xids[next(iter(self._xids))]
        return seen | (xids - unknown)


async def ask_reread(connection: AsyncConnection, generation: str, cause: str) -> None:
    """Ask the listener to read the source again from the slot, under a new generation."""
    await connection.execute(_ASK_REREAD, {"generation": generation, "cause": cause})


async def move(session: AsyncSession, lane: Lane, to: Position, moved: Moved = Moved()) -> None:  # noqa: B008 - immutable
    """Move a lane to a position (its own, where only the counters move), under its lock.

    Args:
        session: holds the lane's row.
        lane: which.
        to: never below where it is.
        moved: by how much its counters change.
    """
    await run(session, _MOVE, lane.handler, lane.number, to.lsn, to.ordinal, *moved)


async def move_several(
    session: AsyncSession, handler: str, moves: Mapping[int, tuple[Position, int]]
) -> None:
    """Move lanes, each to a position above its own and by so many changes, all of which were applied."""
    places, changes = [place for place, _ in moves.values()], [count for _, count in moves.values()]
    lsns, ordinals = [place.lsn for place in places], [place.ordinal for place in places]
    await run(session, _MOVE_SEVERAL, handler, list(moves), lsns, ordinals, changes)


async def count_waiting(session: AsyncSession, lane: Lane, holding: int, parked: int) -> None:
    """Count rows that concern a lane besides the one that is drained, and are its own to apply."""
    connection = await session.connection()
    parameters = {"handler": lane.handler, "lane": lane.number, "holding": holding, "parked": parked}
    await connection.execute(_COUNT_WAITING, parameters)


async def arrive(session: AsyncSession, lane: Lane, at: Position) -> None:
    """Note that a lane has reached a change that belongs to other lanes too, and waits for them."""
    connection = await session.connection()
    await connection.execute(
        _ARRIVE, {"handler": lane.handler, "lane": lane.number, "lsn": at.lsn, "ordinal": at.ordinal}
    )


async def of_all(engine: AsyncEngine) -> dict[Lane, Position]:
    """Read the positions of all lanes."""
    async with singly(engine) as connection:
        return {Lane(row[0], row[1]): Position(row[2], row[3]) for row in await connection.execute(_ALL)}


async def greatest(connection: AsyncConnection) -> Position:
    """Find the highest position that any lane has reached."""
    row = (
        await connection.execute(
            text("select lsn, ordinal from tailrace.lanes order by lsn desc, ordinal desc limit 1")
        )
    ).one_or_none()
    return Position(row[0], row[1]) if row else Position(0, 0)
