"""What the stand-in has done so far, in numbers that tests can wait for.

Numbers only: no rows, no keys. They are read and written on one event loop.
"""

import asyncio
from collections.abc import Callable
from typing import Literal, get_args

Counter = Literal[
    "connections",
    "connections_total",
    "connections_refused",
    "channels",
    "joins",
    "joins_refused",
    "leaves",
    "subscriptions",
    "heartbeats",
    "messages_received",
    "changes",
    "changes_sent",
    "frames_sent",
    "dropped",
    "duplicated",
    "delayed",
    "truncated",
    "rate_limited",
    "clients_cut",
]


class Counters:
    """Counts by name; `connections` and `channels` are those open now, the others only grow."""

    def __init__(self) -> None:
        self._values: dict[Counter, int] = dict.fromkeys(get_args(Counter), 0)
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def __getitem__(self, name: Counter) -> int:
        return self._values[name]

    def add(self, name: Counter, amount: int = 1) -> None:
        """Count, and wake up who waits for it."""
        self._values[name] += amount
        if self._waiting:
            self._wake()

    def snapshot(self) -> dict[str, int]:
        """All counts, a copy."""
        return {str(name): value for name, value in self._values.items()}

    async def reach(self, name: Counter, at_least: int, *, within: float = 10.0) -> None:
        """Wait until a count is at least so high.

        Raises:
            TimeoutError: it was not, `within` seconds later; the message says how far it came.
        """
        await self._become(name, f"at least {at_least}", lambda: self._values[name] >= at_least, within)

    async def sink(self, name: Counter, at_most: int, *, within: float = 10.0) -> None:
        """Wait until a count is at most so high; for `connections` and `channels`.

        Raises:
            TimeoutError: as `reach`.
        """
        await self._become(name, f"at most {at_most}", lambda: self._values[name] <= at_most, within)

    async def _become(self, name: Counter, wanted: str, reached: Callable[[], bool], within: float) -> None:
        if reached():
            return
        signal = asyncio.get_running_loop().create_future()
        entry = (reached, signal)
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(within):
                await signal
        except TimeoutError:
            raise TimeoutError(f"{name} is {self._values[name]} after {within} s, not {wanted}") from None
        finally:
            self._waiting.remove(entry)

    def _wake(self) -> None:
        for reached, signal in self._waiting:
            if not signal.done() and reached():
                signal.set_result(None)
