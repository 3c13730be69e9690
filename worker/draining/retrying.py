"""Within a pass: what is held and due is tried again, in order, and lets go on what waits behind it.

How often is bounded, and what a change needs besides its own lane is taken first; the call itself is made by
applying.py.
"""

import time
from collections.abc import Collection, Iterator, Sequence

from worker import held, parked, positions
from worker.draining.applying import MOST_AT_ONCE, Applying, fate_of
from worker.draining.notes import verdict
from worker.draining.passes import Turn
from worker.held import HeldRow
from worker.overtaking import Applied
from worker.retries import Allowance, Failure

RETRY_SECONDS = 2.0
"""After so long spent on held changes a pass goes on to fresh ones; the rest is due in the next pass."""

ALLOWED_SECONDS = 0.25
"""After so long a pass asks again, where no more retries were allowed for now."""


class Retrying:
    """Tries again what one handler has failed at.

    Args:
        applying: calls the handler.
    """

    def __init__(self, applying: Applying) -> None:
        self._applying = applying
        self._allowance = Allowance(applying.policy.retries_per_second)

    async def retry(self, turn: Turn, suspected: Collection[int] = ()) -> bool:
        """Try what is held and due, in order; True where more of it may be due.

        Args:
            turn: of the pass.
            suspected: lanes that wait for others only so far as rows of theirs are held.
        """
        until = time.monotonic() + RETRY_SECONDS
        seen: list[int] = []
        more = True
        while more and (rows := await held.due(turn.session, turn.lane, seen)):
            more = len(rows) == held.MOST_AT_ONCE
            rows, back = _apart(rows, turn, suspected)
            if back:
                await parked.again(turn.session, [row.id for row in back])
                turn.progress.parked[turn.lane.number] += len(back)
                more = True
            ended, retried = await self._retried(turn, rows, until)
            await self._note(turn, retried)
            if ended is not None:
                return ended
            seen += [row.id for row in rows]
            more = more or turn.lane.number in turn.progress.wake  # the next of a key is due now
        return False

    async def _retried(
        self, turn: Turn, rows: Sequence[HeldRow], until: float
    ) -> tuple[bool | None, list[tuple[HeldRow, Failure | None]]]:
        """Call again for held changes, no two of which have a key in common; return what became of them.

        And whether the pass is to end with them: True where more may be due, None where it goes on.
        """
        done: list[tuple[HeldRow, Failure | None]] = []
        for n, some in enumerate(self._gathered(turn, rows)):
            if n and time.monotonic() > until:
                return True, done
            if any(row.attempts > 0 or row.redriven for row in some) and not self._allowance.take():
                # They stay due: for some at a time, not for each as soon as it may be called.
                turn.progress.due_in = min(ALLOWED_SECONDS, turn.progress.due_in)
                return False, done
            # One of whose lanes is being drained just now stays due.
            free = [row for row in some if await self._others_taken(turn, row)]
            if not free:
                continue
            failure = spoiler = turn.spoilers.get(("held", free[0].id))
            if failure is None and turn.notes is not None:
                failure = verdict(turn.notes.deaths_of_row(free[0].id), self._applying.policy)
            if failure is not None:
                done.append((free[0], failure))
            else:
                if turn.notes is not None:
                    await turn.notes.begin_rows(free[0].id, free[0].id)
                done += await self._applying.again(turn, free, self._allowance.spend)
            if spoiler is not None:
                return True, done
        return None, done

    def _gathered(self, turn: Turn, rows: Sequence[HeldRow]) -> Iterator[Sequence[HeldRow]]:
        """Cut rows into what is called together: for a handler of lists as many as it may be given."""
        handler = self._applying.handler
        most = handler.batch or MOST_AT_ONCE if handler.wants_list and turn.notes is None else 1
        some: list[HeldRow] = []
        positions_of: set[object] = set()
        for row in rows:
            # Positions come again after a restore, and by them changes are told apart.
            same = row.kept.position in positions_of and row.kept.source != "key"
            alone = not row.kept.keys or ("held", row.id) in turn.spoilers
            if some and (same or alone or len(some) >= most):
                yield some
                some, positions_of = [], set()
            some.append(row)
            positions_of.add(row.kept.position)
            if alone:
                yield some
                some, positions_of = [], set()
        if some:
            yield some

    async def _others_taken(self, turn: Turn, row: HeldRow) -> bool:
        others = row.kept.lanes[1:]
        lock = positions.lock_others if row.kept.keys else positions.wait_for_others
        return not others or len(await lock(turn.session, self._applying.handler.name, others)) == len(others)

    async def _note(self, turn: Turn, retried: Sequence[tuple[HeldRow, Failure | None]]) -> None:
        """Note what became of held changes that were called again, and let go on what waits behind them."""
        if not retried:
            return
        progress, session = turn.progress, turn.session
        progress.retried = True
        failed = [(row, failure) for row, failure in retried if failure is not None]
        applied = [row for row, failure in retried if failure is None]
        for row, failure in failed:
            self._applying.tell(turn, failure, row.kept.position)
        for row, outcome in retried:
            progress.tell("applied" if outcome is None else fate_of(outcome), (row.kept.position,))
        await held.failed_again(session, failed)
        await held.let_go(session, applied)
        progress.applied += sum(row.kept.changes for row in applied)
        progress.done += [Applied(row.kept.keys, row.kept.position) for row in applied]
        gone = applied + [row for row, failure in failed if not failure.holds_back]
        for row in gone:
            turn.holds(row.kept.lanes, -1)
        if gone:
            everything = any(not row.kept.keys for row in gone)
            keys = {key for row in gone for key in row.kept.keys}
            await self.release(turn, () if everything else sorted(keys))

    async def release(self, turn: Turn, keys: Sequence[bytes]) -> None:
        """Let what waited behind these keys go on: together, as far as nothing of it has failed itself."""
        # Under suspicion they go one by one, as the others do.
        if keys and self._applying.handler.kind == "change" and turn.notes is None:
            freed = await parked.from_held(turn.session, turn.lane, keys, MOST_AT_ONCE)
            if freed:
                turn.progress.parked[turn.lane.number] += freed
                if len(keys) == 1:
                    return  # all that comes after those waits for them
        turn.progress.wake |= await held.promote(turn.session, self._applying.handler.name, keys)


def _apart(
    rows: Sequence[HeldRow], turn: Turn, suspected: Collection[int]
) -> tuple[list[HeldRow], list[HeldRow]]:
    """Choose what is called again by itself, and what is parked again, to be applied with all that follows.

    That is what needs other lanes and has never failed: it was held while one of them was under suspicion.
    """
    alone: list[HeldRow] = []
    back: list[HeldRow] = []
    for row in rows:
        untried = row.attempts == 0 and not row.redriven and bool(row.kept.keys)
        free = turn.notes is None and not set(row.kept.lanes) & set(suspected)
        known = ("held", row.id) in turn.spoilers
        (back if untried and free and not known and len(row.kept.lanes) > 1 else alone).append(row)
    return alone, back
