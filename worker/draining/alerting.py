"""Calls the hooks for dead letters, at least once for each: what people want to hear of at once.

Which letters are told is noted in their rows, so that another worker tells what this one could not.
"""

import asyncio
import inspect
import random
import time
from collections.abc import Callable, Sequence

import structlog
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker import dead_letters
from worker.asked import Which
from worker.change import Context
from worker.database import explain, is_away
from worker.draining.guard import Watch, guarded
from worker.letters import DeadLetter, Hook
from worker.registry import Handler

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
HOOK_SECONDS = 10.0
"""For one call; its letter's row is locked for as long."""
AGAIN_SECONDS = 30.0
"""After a hook has failed."""
MOST_AT_ONCE = 5

_UNTOLD = text(
    "select id from tailrace.held where status = 'dead' and told_at is null"
    " and handler = any(cast(:names as text[])) and id <> all(cast(:later as bigint[]))"
    " order by id limit :most for update skip locked"
)
_TOLD = text("update tailrace.held set told_at = clock_timestamp() where id = :id")


class Alerting:
    """Tells dead letters of handlers that have hooks."""

    def __init__(
        self, engine: AsyncEngine, handlers: Sequence[Handler], contexts: Callable[[Handler], Context]
    ) -> None:
        self._engine = engine
        self._handlers = {handler.name: handler for handler in handlers if handler.hooks}
        self._contexts = contexts
        self._not_before: dict[int, float] = {}

    @property
    def needed(self) -> bool:
        """Tell whether any handler has a hook."""
        return bool(self._handlers)

    async def keep(self) -> None:
        """Tell for ever what is given up."""
        while True:
            try:
                while await self.once():
                    pass
            except Exception as error:
                if not is_away(error):
                    raise
                log.info("dead letters wait to be told", reason=explain(error))
            await asyncio.sleep(LOOK_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - jitter, not a secret

    async def once(self) -> int:
        """Tell some; returns how many were told."""
        now = time.monotonic()
        self._not_before = {id_: at for id_, at in self._not_before.items() if at > now}
        async with self._engine.begin() as connection:
            parameters = {
                "names": list(self._handlers),
                "later": list(self._not_before),
                "most": MOST_AT_ONCE,
            }
            ids = [row[0] for row in await connection.execute(_UNTOLD, parameters)]
            if not ids:
                return 0
            letters = await dead_letters.find(connection, Which(ids=tuple(ids)))
            return sum([await self._tell(connection, one) for one in letters])

    async def _tell(self, connection: AsyncConnection, found: dead_letters.DeadLetter) -> bool:
        handler = self._handlers[found.handler]
        try:
            letter = _letter(found)
            for hook in handler.hooks:
                await self._call(handler, hook, letter)
        except Exception as error:  # noqa: BLE001 - whatever a hook raises
            log.error(  # noqa: TRY400 - its traceback may show the letter
                "hook for dead letters failed", handler=handler.name, error_class=type(error).__name__
            )
            self._not_before[found.id] = time.monotonic() + AGAIN_SECONDS
            return False
        await connection.execute(_TOLD, {"id": found.id})
        return True

    async def _call(self, handler: Handler, hook: Hook, letter: DeadLetter) -> None:
        arguments: list[object] = [letter]
        if len(inspect.signature(hook).parameters) > 1:
            arguments.append(self._contexts(handler))

        async def work(watch: Watch) -> None:
            await watch.call(hook(*arguments))

        await guarded(HOOK_SECONDS, work, handler.name)


def _letter(found: dead_letters.DeadLetter) -> DeadLetter:
    told = found.told_wholly()
    key = told["key"]
    return DeadLetter(
        id=found.id,
        handler=found.handler,
        schema=told["schema"],
        table=told["table"],
        type=told["type"],
        key=None if key is None else tuple(key),
        position=told["position"],
        attempts=told["attempts"],
        error_class=told["error_class"] or "",
        error=told["error"] or "",
        hint=told["hint"],
        first_failed_at=told["first_failed_at"],
        last_failed_at=told["last_failed_at"],
    )
