"""One transaction for several lanes of a handler, where bells have told what stands in them.

A change that comes alone costs its lane a whole pass, and most of that is the transaction. Where lanes have
to wait for each other anyway, those that wait share one. Only what is plain goes this way: whatever is held,
parked, paused, missing, or fails, is left to passes of the lanes' own, which know what to do about it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sqlalchemy.ext.asyncio import AsyncEngine

from worker import overtaking, positions
from worker.change import Position
from worker.draining.applying import Applying
from worker.draining.entries import Entries
from worker.draining.passes import Pass, Progress, Turn
from worker.driver import transaction
from worker.lanes import Lane, News, Read, check_format
from worker.positions import LaneRow, Limits

_FREE = LaneRow(Position.ZERO, None, 0, 0)
"""Of lanes with nothing held or parked."""


@dataclass
class Shared:
    """What a transaction over several lanes did."""

    generation: str = ""
    progress: Progress = field(default_factory=Progress)
    """Of all of them together."""
    lanes: dict[Lane, Progress] = field(default_factory=dict)
    """Of those that were moved, each for itself."""


class Several:
    """Applies for one handler."""

    def __init__(self, engine: AsyncEngine, applying: Applying, entries: Entries, limits: Limits) -> None:
        self._engine = engine
        self._applying = applying
        self._entries = entries
        self._limits = limits
        self._handler = applying.handler.name

    async def apply(self, news: Mapping[Lane, News], most: int, *, told: bool) -> Shared:
        """Apply what bells have told of these lanes.

        Args:
            news: of each lane.
            most: changes, at most.
            told: the fates of changes are followed.

        Raises:
            Exception: nothing was applied, and each lane is to be tried by itself.
        """
        shared = Shared(progress=Progress(began=time.time_ns()))
        async with transaction(self._engine) as session:
            numbers = sorted(lane.number for lane in news)
            taken = await positions.take_several(session, self._handler, numbers, self._limits)
            if taken is None:
                return shared
            rows, source = taken
            check_format(source.format)
            if source.generation is None or not source.same_server or source.paused:
                return shared
            first = Lane(self._handler, min(rows))
            turn = Turn(
                session,
                first,
                _FREE,
                source,
                shared.progress,
                careful=False,
                together=True,
                spoilers={},
                shared=True,
            )
            heads = await self._heads(turn, rows, news, most)
            if not heads:
                return shared
            batch = sorted(
                (read for reads in heads.values() for read in reads), key=lambda read: read.position
            )
            await self._applying.fresh(turn, batch)
            counts = {number: sum(read.entry.changes for read in reads) for number, reads in heads.items()}
            moves = {number: (reads[-1].position, counts[number]) for number, reads in heads.items()}
            await positions.move_several(session, self._handler, moves)
            if turn.may_overtake and self._applying.handler.kind == "change":
                await overtaking.note(session, self._handler, shared.progress.done)
            shared.progress.commits = time.time_ns()
        shared.generation = source.generation
        shared.progress.read = sum(counts.values())
        for number, reads in heads.items():
            lane, last = Lane(self._handler, number), reads[-1]
            shared.lanes[lane] = replace(
                shared.progress,
                read=counts[number],
                applied=counts[number],
                last=last,
                at=last.position,
                latest_at=last.entry.at,
                ended=Pass.EMPTY if last is news[lane].reads[-1] else Pass.MORE,
                fates=[(read.position, "applied") for read in reads] if told else None,
            )
        return shared

    async def _heads(
        self, turn: Turn, rows: Mapping[int, LaneRow], news: Mapping[Lane, News], most: int
    ) -> dict[int, list[Read]]:
        """Choose what of each lane can be applied: a beginning of what has been told, if anything."""
        heads: dict[int, list[Read]] = {}
        for number, row in rows.items():
            if row.holding or row.parked:
                continue
            reads = self._entries.following(turn, row.position, news[Lane(self._handler, number)])
            plain = next((n for n, read in enumerate(reads) if not _is_plain(read)), len(reads))
            if 0 < plain <= most:
                heads[number] = reads[:plain]
                most -= plain
        hidden = await self._entries.hidden(turn, [read for reads in heads.values() for read in reads])
        if hidden:
            for number, reads in list(heads.items()):
                seen = next((n for n, read in enumerate(reads) if read.entry.xid in hidden), len(reads))
                heads[number] = reads[:seen]
        return {number: reads for number, reads in heads.items() if reads}


def _is_plain(read: Read) -> bool:
    """Tell whether an entry is of this lane alone, and has all that it needs with it."""
    entry = read.entry
    return len(entry.lanes) == 1 and bool(entry.keys) and not entry.stored
