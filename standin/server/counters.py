"""What the stand-in has done so far, in numbers that tests can wait for.

Numbers only: no rows, no keys. They are read and written on one event loop.
"""

import asyncio
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
        self._waiting: list[tuple[Counter, int, asyncio.Future[None]]] = []

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
        if self._values[name] >= at_least:
            return
        reached = asyncio.get_running_loop().create_future()
        self._waiting.append((name, at_least, reached))
        try:
            async with asyncio.timeout(within):
                await reached
        except TimeoutError:
            raise TimeoutError(f"{name} is {self._values[name]} after {within} s, not {at_least}") from None
        finally:
            self._waiting = [entry for entry in self._waiting if entry[2] is not reached]

    def _wake(self) -> None:
        for name, at_least, reached in self._waiting:
            if self._values[name] >= at_least and not reached.done():
                reached.set_result(None)
