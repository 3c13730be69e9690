"""Runs a handler's coroutine so that nothing it does with its task can harm the worker.

It runs in a task of its own, one for a batch: a handler that cancels itself, raises SystemExit or swallows
its cancellation fails its change and nothing else. One that does not even end when it is cancelled is left
behind; its session is closed, so that nothing of it can be committed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import structlog

from worker.errors import HandlerExit, HandlerStuck

log = structlog.get_logger(__name__)

GRACE_SECONDS = 5.0
"""How long a cancelled handler may take to end."""

_left_behind: set[asyncio.Task[None]] = set()


class Watch:
    """Of the calls in one task."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        """For one call."""
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self.stopped = False
        """The worker itself has cancelled the task."""

    @property
    def left(self) -> float:
        """Seconds until the present call must have ended."""
        return self._since + self.seconds + GRACE_SECONDS - self._loop.time()

    async def call(self, coroutine: Awaitable[None]) -> None:
        """Make one call.

        Raises:
            HandlerExit: it ended by something that is no Exception.
            TimeoutError: it took too long.
            Exception: what the handler raised.
        """
        self._since = self._loop.time()
        try:
            async with asyncio.timeout(self.seconds):
                await coroutine
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self.stopped or task is None:
                raise
            while task.cancelling():
                task.uncancel()
            raise HandlerExit("the handler cancelled itself") from error
        except Exception:
            raise
        except BaseException as error:
            # Left alone, some of these would end the event loop.
            raise HandlerExit(f"the handler raised {type(error).__name__}") from error


async def guarded(seconds: float, work: Callable[[Watch], Coroutine[Any, Any, None]], name: str) -> None:
    """Make calls in a task of their own.

    Args:
        seconds: for one call.
        work: makes them, each by the watch.
        name: of the handler.

    Raises:
        HandlerStuck: a call does not end, not even when it is cancelled. Its session must not be used again.
        Exception: as Watch.call.
    """
    watch = Watch(seconds)
    task = asyncio.create_task(work(watch), name=f"worker: call {name}")
    try:
        while not task.done():
            if (left := watch.left) <= 0:
                _leave_behind(task, name)
                raise HandlerStuck(f"the call did not end {seconds + GRACE_SECONDS:g} s after its beginning")
            await asyncio.wait({task}, timeout=left)
    except asyncio.CancelledError:
        watch.stopped = True
        task.cancel()
        await asyncio.wait({task}, timeout=GRACE_SECONDS)
        if not task.done():
            _leave_behind(task, name)
        raise
    task.result()


def _leave_behind(task: asyncio.Task[None], name: str) -> None:
    log.error("handler does not end", handler=name)
    _left_behind.add(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[None]) -> None:
    _left_behind.discard(task)
    if not task.cancelled():
        task.exception()  # nobody waits for it any more
