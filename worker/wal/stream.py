"""Reading the log by the streaming protocol: the server sends as soon as a transaction commits.

Feedback has a task of its own, so that the server is answered also while nobody reads: a walsender without
answers cuts the connection, and would decode the transaction again, for ever. A keepalive's position counts
only in the order in which it came, and outside a transaction.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Final, Self

from worker.wal.failures import ReadingLostError
from worker.wal.transactions import Assembler, WalBatch
from worker.wal.type_names import TypeNames
from worker.wal.walsender import Keepalive, Walsender

_FEEDBACK_SECONDS: Final = 1.0
_SILENCE_SECONDS: Final = 10.0
"""Every feedback asks for an answer; so many seconds without one are a dead connection."""
_INSISTENT: Final = 20
"""A running server asks for an answer when it has heard nothing for seconds, not so often at one position."""
BATCH_CHANGES: Final = 1000
BATCH_BYTES: Final = 4 << 20


class StreamReader:
    """One reading of the log over one connection. Whatever ends it, a new one begins at the slot again."""

    def __init__(self, sender: Walsender, names: TypeNames) -> None:
        self._sender = sender
        self._names = names
        self._log = Assembler(names.known)
        self._flushed = 0
        self._asked = self._asked_at = 0
        self._feedback = asyncio.create_task(self._report(), name="feedback to the walsender")

    @classmethod
    async def open(cls, url: str, *, slot: str, publication: str, names: TypeNames) -> Self:
        """Connect and start streaming from where the slot stands.

        Raises:
            WalError: it cannot be had, with the kind that says why.
        """
        sender = await Walsender.connect(url)
        try:
            await sender.start(slot, publication)
        except BaseException:
            await sender.close()
            raise
        return cls(sender, names)

    async def read(self) -> AsyncIterator[WalBatch]:
        """Yield batches as they come, at most about 1000 changes or 4 MiB each, until closed.

        Raises:
            WalError: the stream ended.
            MalformedChange: what came is not the protocol.
        """
        while True:
            await self._fill()
            batch = self._log.take()
            if batch is None:
                await self._sender.wait()
            else:
                yield batch
                # Whoever takes batches may never wait; others have a turn all the same.
                await asyncio.sleep(0)

    async def advance(self, lsn: int) -> int:
        """Let the slot move to an LSN, at most to what has been handed over whole.

        Returns:
            The LSN that was reported; the slot follows within milliseconds.
        """
        self._flushed = max(self._flushed, min(lsn, self._log.read_to))
        self._tell(ask=False)
        return self._flushed

    def wake(self) -> None:
        """Do nothing: the stream needs no bell."""

    async def close(self) -> None:
        """Stop reading, and free the slot."""
        self._feedback.cancel()
        await asyncio.gather(self._feedback, return_exceptions=True)
        await self._sender.close()

    async def _fill(self) -> None:
        """Take what is there, up to the size of a batch."""
        reading, sender = self._log, self._sender
        while reading.count < BATCH_CHANGES and reading.bytes < BATCH_BYTES:
            message = sender.next()
            if message is None:
                return
            if isinstance(message, Keepalive):
                reading.pass_to(message.wal_end)
                if message.wants_reply:
                    self._answer(message.wal_end)
                continue
            unknown = reading.feed(message.payload)
            if unknown:
                await self._names.learn(unknown, reading.said)

    def _answer(self, wal_end: int) -> None:
        """Answer a keepalive that asks for it.

        Raises:
            ReadingLostError: Postgres is stopping. It would not before all is confirmed, and asks again and
                again; but what would have to apply it has lost its connections already.
        """
        self._asked = self._asked + 1 if wal_end == self._asked_at else 1
        self._asked_at = wal_end
        if self._asked > _INSISTENT:
            raise ReadingLostError("the log's stream ended: Postgres is stopping")
        self._tell(ask=False)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_FEEDBACK_SECONDS)
            if self._sender.starving and time.monotonic() - self._sender.heard > _SILENCE_SECONDS:
                self._sender.give_up(
                    ReadingLostError(f"nothing was heard of the server for {_SILENCE_SECONDS:.0f} s")
                )
                return
            self._asked = 0
            self._tell(ask=True)

    def _tell(self, *, ask: bool) -> None:
        self._sender.report(seen=self._log.read_to, flushed=self._flushed, ask=ask)
