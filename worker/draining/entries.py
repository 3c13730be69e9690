"""Within a pass: what stands in the lane's stream above its position, and what is done with it.

Entries are applied or parked, alone or together with other lanes; or the lane waits for another one. The
transaction around it, and what follows its commit, is the drain's business (drain.py).
"""

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import replace
from functools import partial

import structlog

from worker import gaps, payloads, positions
from worker.change import Position
from worker.draining.applying import Applying
from worker.draining.joint import Gate, Joint, has_hole, join
from worker.draining.meetings import Meeting, meet, other_lanes
from worker.draining.notes import Notes, Suspicion, verdict
from worker.draining.parking import AT_ONCE as PARKED_AT_ONCE
from worker.draining.parking import park
from worker.draining.passes import Pass, Turn
from worker.draining.retrying import Retrying
from worker.draining.truncates import with_kept_keys
from worker.draining.unparking import Unparking
from worker.lanes import Lane, Lanes, News, Read
from worker.positions import Seen

log = structlog.get_logger(__name__)

Take = Callable[[Turn, Sequence[Read]], Awaitable[None]]
"""What is done with entries: applied, or parked."""


class HoleError(Exception):
    """Something is missing between the position and the next entry."""


class Entries:
    """Takes the entries of one handler's lanes.

    Args:
        applying: calls the handler.
        lanes: the entries.
        seen: transactions that can be seen.
        suspicions: lanes over which a worker has died; those found innocent are taken out.
        batch: entries of a pass, at most.
    """

    def __init__(
        self,
        applying: Applying,
        lanes: Lanes,
        seen: Seen,
        suspicions: MutableMapping[Lane, Suspicion],
        batch: int,
    ) -> None:
        self.gate = Gate()
        self._applying = applying
        self._derives = applying.handler.kind == "derive"
        self._lanes = lanes
        self._visible = seen
        self._suspicions = suspicions
        self._batch = batch
        self._retrying = Retrying(applying)
        self._unparking = Unparking(applying, self._retrying, self.gate, suspicions, batch)

    async def retry(self, turn: Turn) -> bool:
        """Try what is held and due; see `Retrying.retry`."""
        suspected = {lane.number for lane in self._suspicions}
        if not suspected:
            return await self._retrying.retry(turn)
        # One at a time: a suspected lane and those that it needs would refuse each other their rows.
        async with self.gate.taking() as alone:
            return await self._retrying.retry(turn, suspected) if alone else True

    async def take(self, turn: Turn, most: int, news: News | None = None) -> tuple[Sequence[int], bool]:
        """Apply what stands in the stream above the position, or park it; what is parked comes first.

        Args:
            turn: of the pass.
            most: changes, at most.
            news: what a bell has told of them.

        Returns:
            The other lanes that have met this one and are to be moved with it, and whether there may be more.

        Raises:
            HoleError: entries are missing that can be read again.
            CallFailedError, TransactionSpoiltError, LaneBlockedError: as in `Applying.fresh`.
        """
        progress = turn.progress
        told = self._told(turn, news)
        found, parks, full = (
            await self._found(turn, most) if not told else (told[:most], False, len(told) > most)
        )
        is_parked = turn.row.parked > 0 or progress.parked[turn.lane.number] > 0
        if is_parked and not parks and not turn.source.paused:
            # What is parked came before all that is in the stream.
            if not await self._unparking.unpark(turn, most):
                progress.ended = Pass.BUSY
            return [], True
        take: Take = partial(park, derives=self._derives) if parks else self._applying.fresh
        seen = await self._seen(turn, found)
        reads = await self._with_payloads(turn, seen)
        full = full or len(reads) < len(seen)
        if turn.notes is not None and not parks:
            turn, reads = await self._few(turn, turn.notes, reads)
            full = True
        if batch := self._applying.cut(turn, _until_meeting(reads)):
            await self._chained(turn, batch)
            batch = await with_kept_keys(turn, self._applying.handler, self._applying.decoder, batch)
            await take(turn, batch)
            progress.last, progress.read = batch[-1], sum(read.entry.changes for read in batch)
            full = full or len(batch) < len(reads)
            if not full and len(seen) < len(found):
                progress.ended = Pass.SOON  # no bell rings for what has only to become visible
            return [], full
        if reads and (joint := await self._joint(turn, reads, most, parks=parks)) is not None:
            return await self._together(turn, joint, take)
        if reads:
            met = await self._meet(turn, reads[0], take)
            waits = progress.ended is Pass.MEETING and turn.row.parked > 0 and not turn.source.paused
            # A lane that is to be parked and waits for others goes on with what is parked meanwhile.
            if waits and await self._unparking.unpark(turn, most):
                progress.ended = Pass.MORE
            return met, False
        if found:
            progress.ended = Pass.SOON
        return [], False

    def _told(self, turn: Turn, news: News | None) -> list[Read]:
        """Give what a bell has told, where that follows the position and is to be applied."""
        waits = turn.source.paused or turn.row.parked > 0 or turn.progress.parked[turn.lane.number] > 0
        if news is None or waits or turn.notes is not None:
            return []
        return self.following(turn, turn.row.position, news)

    def following(self, turn: Turn, position: Position, news: News) -> list[Read]:
        """Give what a bell has told of a lane above its position; nothing where something is missing."""
        if news.base != self._lanes.base(str(turn.source.generation)):
            return []
        reads = [read for read in news.reads if read.position > position]
        return [] if has_hole(position, reads, turn.source.floor) else reads

    async def _found(self, turn: Turn, most: int) -> tuple[list[Read], bool, bool]:
        """Read entries above the position; tell whether to park them, and whether there may be more."""
        generation, lane, position = str(turn.source.generation), turn.lane, turn.row.position
        if turn.notes is not None and turn.notes.suspicion.entries.until is None:
            most = self._batch  # all that the dead worker may have had in hand
        reads, park_to, more = await self._lanes.read(generation, lane, position, most)
        if not reads or not (turn.source.paused or reads[0].entry.count <= park_to):
            return reads, False, more
        if len(reads) == most:
            reads, _, _ = await self._lanes.read(generation, lane, position, PARKED_AT_ONCE)
        if not turn.source.paused:
            reads = [read for read in reads if read.entry.count <= park_to]
        return reads, True, True

    async def _few(self, turn: Turn, notes: Notes, reads: list[Read]) -> tuple[Turn, list[Read]]:
        """Of a lane under suspicion take a few entries, and note the call; or judge the first of them."""
        hand = notes.suspicion.entries
        if hand.until is None and reads:
            hand.until = reads[-1].position
        if not reads or hand.until is None or reads[0].position > hand.until:
            self._suspicions.pop(turn.lane, None)
            return turn, reads
        position, entry = reads[0]
        failure = verdict(notes.deaths(position), self._applying.policy)
        if failure is None:
            reads = reads[: notes.few(position)]
            await notes.begin(position, reads[-1].position)
            return turn, reads
        culprits: Sequence[object] = entry.keys if self._applying.handler.kind == "derive" else (position,)
        turn.spoilers.update(dict.fromkeys(culprits, failure))
        return replace(turn, careful=True), reads[:1]

    async def _ready(self, turn: Turn, reads: list[Read]) -> list[Read]:
        """Cut off what cannot be taken yet, and complete the rest."""
        return await self._with_payloads(turn, await self._seen(turn, reads))

    async def _with_payloads(self, turn: Turn, reads: list[Read]) -> list[Read]:
        """Give entries their payloads where those are in Postgres; cut off what is too much at once."""
        if not any(read.entry.stored for read in reads):
            return reads
        reads = list(payloads.fitting(reads))
        stored = [read for read in reads if read.entry.stored]
        generation, handler = str(turn.source.generation), turn.lane.handler
        found = await payloads.fetch(turn.session, generation, handler, stored)
        if len(found) < len(stored) and turn.source.delivery == "proven":
            raise HoleError
        return [found.get(read.position, read) for read in reads]

    async def _seen(self, turn: Turn, reads: list[Read]) -> list[Read]:
        """Cut off what is decoded but cannot be seen yet: a handler would compute from the old state."""
        hidden = await self.hidden(turn, reads)
        return next((reads[:n] for n, read in enumerate(reads) if read.entry.xid in hidden), reads)

    async def hidden(self, turn: Turn, reads: Sequence[Read]) -> set[int]:
        """Find transactions of entries that cannot be seen yet."""
        snapshot = turn.source.snapshot
        xids = {read.entry.xid for read in reads}
        doubtful = {xid for xid in xids if xid is not None and (snapshot is None or not snapshot.shows(xid))}
        if not doubtful:
            return doubtful
        # The entries were read after the snapshot was taken.
        return doubtful - await self._visible.visible(turn.session, str(turn.source.generation), doubtful)

    async def _joint(self, turn: Turn, reads: list[Read], most: int, *, parks: bool) -> Joint | None:
        """See whether several lanes can go on, or be parked, in this transaction."""
        # What is under suspicion is taken one by one, and by its own lane's passes.
        if turn.notes is not None or turn.spoilers or len(reads[0].entry.lanes) == 1:
            return None
        if has_hole(turn.row.position, reads, turn.source.floor):
            return None
        shunned = {lane.number for lane in self._suspicions}
        async with self.gate.taking() as alone:
            if not alone:
                return None
            most = PARKED_AT_ONCE if parks else most
            return await join(turn, reads, self._lanes, most, self._ready, shunned, parks=parks)

    async def _together(self, turn: Turn, joint: Joint, take: Take) -> tuple[Sequence[int], bool]:
        """Apply or park the next changes of several lanes; returns as `_pass_entries` does."""
        progress = turn.progress
        await take(turn, joint.batch)
        progress.last = joint.lasts.pop(turn.lane.number)
        progress.read = sum(read.entry.changes for read in joint.batch)
        progress.others = joint.lasts
        progress.wake.update(joint.behind - {turn.lane.number})
        return [], True

    async def _meet(self, turn: Turn, read: Read, take: Take) -> Sequence[int]:
        """Go to a change of several lanes; return the other lanes that have been moved past it."""
        progress, lane = turn.progress, turn.lane
        if await self._chained(turn, [read]):
            # What is missing is passed now: whoever applies the change knows nothing of the hole.
            progress.at = Position.parse(read.entry.previous)
            await positions.move(turn.session, lane, progress.at)
        state = await meet(turn, read)
        if state is Meeting.WAITING:
            progress.ended = Pass.MEETING
            return []
        others = other_lanes(read, lane)
        progress.last, progress.ended = read, Pass.MORE
        progress.wake.update(others)
        if state is Meeting.READY:
            await take(turn, [read])
            progress.read = read.entry.changes
            return others
        log.error(
            "change left to its gap", handler=lane.handler, lane=lane.number, position=str(read.position)
        )
        return []

    async def _chained(self, turn: Turn, reads: Sequence[Read]) -> bool:
        """Check that nothing is missing between the position and what is to be applied; True where it is.

        An entry names the one before it. In plain delivery nobody can read a lost one again: the hole is
        recorded as a gap, in the transaction that passes it, and derive handlers are backfilled for it.
        """
        hole = has_hole(turn.row.position, reads, turn.source.floor)
        if hole and turn.source.delivery == "proven":
            raise HoleError
        if hole:
            cause = "entries of a lane were lost in Redis"
            tables = sorted({(one.schema, one.table) for one in self._applying.handler.subscriptions})
            await gaps.record(turn.session, cause=cause, tables=tables)
            log.error("gap", handler=turn.lane.handler, lane=turn.lane.number, cause=cause)
        return hole


def _until_meeting(reads: Sequence[Read]) -> Sequence[Read]:
    """Cut a batch before the first change that belongs to several lanes, or to all keys of the only one."""
    for n, read in enumerate(reads):
        if len(read.entry.lanes) > 1 or (read.entry.payload and not read.entry.keys):
            return reads[:n]
    return reads
