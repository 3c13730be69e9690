"""An answer that is kept for a moment: however many ask, the process is asked once at a time.

It starts no task of its own. Whoever asks first does the work; should that one go away, the next one does it.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """Keeps the last answer.

    Args:
        ask: for a new one.
        seconds: for so long an answer is good.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], seconds: float) -> None:
        self._ask = ask
        self._seconds = seconds
        self._answer: T
        self._until = float("-inf")
        self._one_at_a_time = asyncio.Lock()

    async def get(self) -> T:
        """Give the answer; raises what asking raises, which is not kept."""
        async with self._one_at_a_time:
            if time.monotonic() >= self._until:
                self._answer = await self._ask()
                self._until = time.monotonic() + self._seconds
            return self._answer
