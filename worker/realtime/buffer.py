"""What has been read and not yet taken: a bounded buffer between the socket and the listener.

It knows nothing of frames. While it is full the reader waits, the socket is not read, and the server's own
queue and TCP hold the rest. Gaps take part in the order but never wait: they are few, and must not be lost.
"""

import asyncio
from collections import deque

from worker.change import RawChange
from worker.source import Gap


class Buffer:
    """Ordered changes and gaps, bounded by number and by bytes of payload.

    Args:
        changes: hold at most so many changes.
        size: hold at most so many bytes of payload; a single larger change passes alone.
        batch: hand out at most so many items at once.
    """

    def __init__(self, changes: int = 10_000, size: int = 64 * 1024 * 1024, batch: int = 1000) -> None:
        self._changes, self._size, self._batch = changes, size, batch
        self._items: deque[RawChange | Gap] = deque()
        self._held = self._bytes = 0
        self._filled = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def __len__(self) -> int:
        """Items that wait to be taken."""
        return len(self._items)

    @property
    def full(self) -> bool:
        """True while nothing more may be read from the socket."""
        return not self._room.is_set()

    def put(self, change: RawChange) -> None:
        """Append a change. The caller waits for `room` before it reads the next one."""
        self._items.append(change)
        self._held += 1
        self._bytes += len(change.payload)
        if self._held >= self._changes or self._bytes >= self._size:
            self._room.clear()
        self._filled.set()

    def put_gap(self, gap: Gap) -> None:
        """Append a gap; one that only adds tables to the gap before it is joined to that."""
        last = self._items[-1] if self._items else None
        if isinstance(last, Gap) and (last.since, last.cause) == (gap.since, gap.cause):
            tables = tuple(dict.fromkeys(last.tables + gap.tables))
            self._items[-1] = Gap(last.since, max(last.until, gap.until), last.cause, tables)
        else:
            self._items.append(gap)
        self._filled.set()

    async def room(self) -> None:
        """Wait until there is room for another change."""
        await self._room.wait()

    async def filled(self) -> None:
        """Wait until there is something to take, or `wake` was called."""
        await self._filled.wait()

    def wake(self) -> None:
        """End the wait of the taker, although there may be nothing to take."""
        self._filled.set()

    def take(self) -> list[RawChange | Gap]:
        """Take the oldest items, up to the size of a batch; an empty list when there are none."""
        items = self._items
        taken = [items.popleft() for _ in range(min(self._batch, len(items)))]
        for item in taken:
            if isinstance(item, RawChange):
                self._held -= 1
                self._bytes -= len(item.payload)
        if self._held < self._changes and self._bytes < self._size:
            self._room.set()
        if not items:
            self._filled.clear()
        return taken
