"""The way of a change frame from the feed to its client, with the faults that lie on it.

Frames keep their order, also the delayed ones.
"""

import asyncio
import random
from collections import deque

from standin.server import tampering
from standin.server.channel import Channel
from standin.server.counters import Counters
from standin.server.faults import Faults


class Gate:
    """Lets changes pass, or loses, doubles, delays and changes them as the faults say."""

    def __init__(self, faults: Faults, counters: Counters, random_source: random.Random) -> None:
        self._faults = faults
        self._counters = counters
        self._random = random_source
        self._delayed: deque[tuple[float, Channel, bytes]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    def passes(self, channel: Channel, data: bytes, ids: tuple[int, ...]) -> None:
        """Send one change to its channel, or not."""
        if not self._faults.affect_changes() and not self._delayed:
            self._send(channel, channel.change_frame(data, ids))
            return
        if self._lost():
            self._counters.add("dropped")
            return
        frame = channel.change_frame(self._tampered(data), ids)
        copies = 1
        if self._faults.duplicate and self._random.random() < self._faults.duplicate:
            self._counters.add("duplicated")
            copies = 2
        for _ in range(copies):
            if self._faults.delay_ms or self._delayed:
                self._delay(channel, frame)
            else:
                self._send(channel, frame)

    def release(self) -> None:
        """Faults were changed: without a delay, what was delayed goes out now."""
        if not self._faults.delay_ms:
            self._stop_timer()
            while self._delayed:
                _due, channel, frame = self._delayed.popleft()
                self._send(channel, frame)

    def close(self) -> None:
        """Forget what is delayed."""
        self._delayed.clear()
        self._stop_timer()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lost(self) -> bool:
        faults = self._faults
        if faults.silent is True:
            return True
        if faults.drop_next:
            faults.drop_next -= 1
            return True
        return bool(faults.drop) and self._random.random() < faults.drop

    def _tampered(self, data: bytes) -> bytes:
        faults = self._faults
        if faults.error_events is not None:
            data = tampering.error_event(data, faults.error_events)
        elif faults.truncate:
            self._counters.add("truncated")
            data = tampering.truncated(data)
        if faults.oversize:
            faults.oversize = False
            data = tampering.oversized(data)
        return data

    def _send(self, channel: Channel, frame: bytes) -> None:
        if channel.closed:
            return
        channel.client.send(frame)
        self._counters.add("changes_sent")

    def _delay(self, channel: Channel, frame: bytes) -> None:
        self._counters.add("delayed")
        due = asyncio.get_running_loop().time() + self._faults.delay_ms / 1000
        if self._delayed:
            due = max(due, self._delayed[-1][0])
        self._delayed.append((due, channel, frame))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(due, self._let_out)

    def _let_out(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        while self._delayed and self._delayed[0][0] <= loop.time():
            _due, channel, frame = self._delayed.popleft()
            self._send(channel, frame)
        if self._delayed:
            self._timer = loop.call_at(self._delayed[0][0], self._let_out)
