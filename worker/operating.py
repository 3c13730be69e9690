"""What operators may do, by command and over HTTP: look, decide, and have the lanes woken afterwards.

Knows who wants what, not how it is carried out (redriving.py, pausing.py) nor how it was asked for.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncEngine

from worker import backfilling, dead_letters, pausing, redriving
from worker.asked import Operator, Which
from worker.backfilling import Wanted
from worker.dead_letters import DeadLetter
from worker.errors import Refused, Unknown
from worker.lanes import Lane, Lanes
from worker.redriving import Edit
from worker.registry import Handler

AT_ONCE = 200
"""Dead letters read at a time where many are decided about."""
TOGETHER = 2_000
MOST_BYTES = 8 << 20
"""Of payloads: no more dead letters are put into groups, by their lanes, and decided about group by group."""
WAKE_SECONDS = 2.0
"""By then the workers have found the lanes by themselves."""

Wake = Callable[[Iterable[Lane]], Awaitable[None]]


def waker(lanes: Lanes, enqueue: Callable[[Lane], Awaitable[None]]) -> Wake:
    """Make what wakes lanes; a hint, which may be lost while Redis is away."""

    async def wake(concerned: Iterable[Lane]) -> None:
        with contextlib.suppress(RedisError, OSError, TimeoutError):
            async with asyncio.timeout(WAKE_SECONDS):
                for lane in await lanes.ring(concerned):
                    await enqueue(lane)

    return wake


class Operations:
    """All of it, on one database."""

    def __init__(
        self,
        engine: AsyncEngine,
        handlers: Callable[[], Sequence[Handler]],
        wake: Wake,
    ) -> None:
        """Prepare; nothing is opened.

        Args:
            engine: of the database.
            handlers: gives those that are loaded, where that matters.
            wake: has lanes drained that can go on.
        """
        self._engine = engine
        self._handlers = handlers
        self._wake = wake

    async def find(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List dead letters in the order of their ids; above an id, at most so many.

        Raises:
            Unknown: there is no such handler.
        """
        return [one.told() for one in await self._page(which, after, most)]

    async def show(self, id_: int) -> dict[str, Any]:
        """Tell all about one dead letter.

        Raises:
            Unknown: there is none of this id.
        """
        async with self._engine.connect() as connection:
            return await dead_letters.show(connection, id_)

    async def held(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List what has failed and will be retried, in the order of the ids; above an id, at most so many.

        Raises:
            Unknown: there is no such handler.
        """
        return [one.told() for one in await self._page(which, after, most, "held")]

    async def show_held(self, id_: int) -> dict[str, Any]:
        """Tell all about one change that has failed and will be retried.

        Raises:
            Unknown: there is none of this id, any more.
        """
        async with self._engine.connect() as connection:
            return await dead_letters.show(connection, id_, "held")

    async def redrive(
        self, operator: Operator, id_: int, record: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Have a dead letter tried again, perhaps with other values in its record.

        Raises:
            Unknown: there is none of this id.
            Refused: nobody would apply it, or the record does not fit.
        """
        edit = None if record is None else Edit(record, self._handlers())
        done = await redriving.redrive(self._engine, operator, id_, edit)
        await self._wake(done.wake)
        return done.told

    async def discard(self, operator: Operator, id_: int) -> dict[str, Any]:
        """Forget a dead letter.

        Raises:
            Unknown: there is none of this id.
        """
        done = await redriving.discard(self._engine, operator, id_)
        await self._wake(done.wake)
        return done.told

    async def decide(
        self,
        operator: Operator,
        action: Literal["redrive", "discard"],
        which: Which,
        *,
        dry_run: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[dict[str, Any]]:
        """Redrive or discard all that are meant, in the order of their ids; `dry_run` only says which.

        Each is a decision of its own, though many are carried out together. What somebody else has decided
        meanwhile is left out; where one is refused, `refused` of it says why, and the others go on.

        Args:
            operator: who decides.
            action: what is to be done.
            which: those that are meant.
            dry_run: nothing is done.
            progress: is told now and then how many are done, of how many.

        Raises:
            Unknown: an id is none, or there is no such handler; nothing was done.
        """
        if which.ids is not None:
            found = {one["id"] for one in await self.find(which)}
            if missing := sorted(set(which.ids) - found):
                raise dead_letters.unknown(missing)
        async with self._engine.connect() as connection:
            expected = await dead_letters.count(connection, which) if progress is not None else 0
        told: list[dict[str, Any]] = []
        async for some in self._some(which):
            told += [one.told() for one in some] if dry_run else await self._together(operator, action, some)
            if progress is not None:
                progress(len(told), max(expected, len(told)))
        return told

    async def _some(self, which: Which) -> AsyncIterator[list[DeadLetter]]:
        """Read all that are meant, as many at a time as are decided about together."""
        after: int | None = None
        some: list[DeadLetter] = []
        while page := await self._page(which, after, AT_ONCE):
            after = page[-1].id
            some += page
            if len(some) >= TOGETHER or sum(len(one.payload) for one in some) > MOST_BYTES:
                yield some
                some = []
        if some:
            yield some

    async def _page(
        self, which: Which, after: int | None, most: int | None, what: dead_letters.What = "dead"
    ) -> list[DeadLetter]:
        async with self._engine.connect() as connection:
            found = await dead_letters.find(connection, which, after=after, most=most, what=what)
            if not found and which.handler is not None:
                # A name that is mistyped must not look as if all were well.
                await dead_letters.check_handler(connection, which.handler)
            return found

    async def _together(
        self, operator: Operator, action: Literal["redrive", "discard"], some: Sequence[DeadLetter]
    ) -> list[dict[str, Any]]:
        """Decide about dead letters, each group in one transaction."""
        do = redriving.redrive_together if action == "redrive" else redriving.discard_together
        told: dict[int, dict[str, Any]] = {}
        async with self._engine.connect() as connection:
            groups = await redriving.grouped(connection, some)
        for group in groups:
            try:
                done = await do(self._engine, operator, [one.id for one in group])
            except (Refused, Unknown):  # which of them, and why?
                for one in group:
                    with contextlib.suppress(Unknown):  # somebody else has decided about it
                        told[one.id] = await self._decided(operator, action, one.told())
            else:
                await self._wake({lane for one in done for lane in one.wake})
                told |= {one.told["id"]: one.told for one in done}
        return [told[one.id] for one in some if one.id in told]

    async def _decided(
        self, operator: Operator, action: Literal["redrive", "discard"], one: dict[str, Any]
    ) -> dict[str, Any]:
        do = self.redrive if action == "redrive" else self.discard
        try:
            return await do(operator, one["id"])
        except Refused as error:
            return one | {"refused": str(error)}

    async def lanes(self, handler: str | None = None) -> list[dict[str, Any]]:
        """Tell of each handler what is paused, and what waits.

        Raises:
            Unknown: there is no such handler.
        """
        return await pausing.list_lanes(self._engine, handler)

    async def pause(
        self, operator: Operator, handler: str, lane_key: str | None = None, *, paused: bool
    ) -> dict[str, Any]:
        """Pause a handler, or one lane key of it; or let it go on.

        Raises:
            Unknown: there is no such handler, or no such paused key.
            Refused: that is no lane key of the handler.
        """
        if lane_key is None:
            change = pausing.pause if paused else pausing.resume
            done = await change(self._engine, operator, handler)
        else:
            key = await pausing.read_key(self._engine, self._handlers(), handler, lane_key)
            change_key = pausing.pause_key if paused else pausing.resume_key
            done = await change_key(self._engine, operator, handler, key)
        await self._wake(done.wake)
        return done.told

    async def backfill(
        self,
        operator: Operator,
        table: str,
        *,
        handler: str | None = None,
        condition: str | None = None,
        rate: int | None = None,
    ) -> list[dict[str, Any]]:
        """Have the rows that are there given to handlers.

        Args:
            operator: who wants it.
            table: `schema.table`, or of public.
            handler: whose; by default all derive handlers of the table.
            condition: SQL, for some rows alone. Never from a stranger.
            rate: rows a second, at most.

        Raises:
            Refused: it makes no sense, or is under way.
        """
        return await backfilling.ask(self._engine, operator, Wanted.of(table, handler, condition, rate))

    async def backfills(self, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """List backfills."""
        return await backfilling.find(self._engine, ids)

    async def cancel_backfill(self, id_: int) -> dict[str, Any]:
        """Have a backfill stop.

        Raises:
            Unknown: there is none of this id.
            Refused: it is over, or closes a gap.
        """
        return await backfilling.cancel(self._engine, id_)

    async def resume_backfill(self, id_: int, rate: int | None = None) -> dict[str, Any]:
        """Have a backfill go on, if it was cancelled; perhaps at another rate.

        Raises:
            Unknown: there is none of this id.
            Refused: it is done.
        """
        return await backfilling.go_on(self._engine, id_, rate)
