"""One interface to the log, over two transports: the stream, and windows read by SQL functions.

The stream needs a direct connection; windows work over any, through a transaction-mode pooler too. Which one
a connection allows is found out by trying.
"""

from collections.abc import AsyncIterator
from typing import Literal, NamedTuple, Protocol

from sqlalchemy.ext.asyncio import AsyncEngine

from worker.wal.failures import NotPermittedError
from worker.wal.stream import StreamReader
from worker.wal.transactions import WalBatch
from worker.wal.type_names import TypeNames
from worker.wal.walsender import Walsender
from worker.wal.windows import WindowReader

__all__ = ["Reader", "Transport", "WalBatch", "choose_transport", "open_reader"]


class Reader(Protocol):
    """One reading of the log, from where the slot stands, to its end."""

    def read(self) -> AsyncIterator[WalBatch]:
        """Yield batches in the order of the log, each bounded in changes and bytes.

        Nothing is read ahead by more than about a batch while the caller does not ask for the next one. Ends
        only by an exception, or when closed.

        Raises:
            WalError: reading ended; nothing in it says that the slot is lost but SlotLostError.
            MalformedChange: what came is not the protocol.
        """
        ...

    async def advance(self, lsn: int) -> int:
        """Move the slot to an LSN, at most to the last `read_to` that was handed over; never back.

        The target must have been recorded before. Returns the LSN that the slot was asked to move to.
        """
        ...

    def wake(self) -> None:
        """Tell that something was committed: whoever polls looks at once."""
        ...

    async def close(self) -> None:
        """Stop, and free the slot."""
        ...


class Transport(NamedTuple):
    """How the log is read, with the reason in words."""

    kind: Literal["stream", "windows"]
    reason: str


async def choose_transport(url: str, direct_url: str | None = None) -> Transport:
    """Find out whether a replication connection can be had.

    Args:
        url: DATABASE_URL.
        direct_url: DATABASE_DIRECT_URL, tried instead where it is given.

    Raises:
        ReadingLostError: the server cannot be reached, so nobody knows.
    """
    name = "DATABASE_DIRECT_URL" if direct_url else "DATABASE_URL"
    try:
        sender = await Walsender.connect(direct_url or url)
    except NotPermittedError as error:
        return Transport("windows", f"{name} allows no replication connection: {error}")
    await sender.close()
    return Transport("stream", f"{name} allows a replication connection")


async def open_reader(
    transport: Transport, *, url: str, engine: AsyncEngine, slot: str, publication: str, names: TypeNames
) -> Reader:
    """Begin a reading.

    Args:
        transport: as chosen.
        url: for the stream: the URL that `choose_transport` tried.
        engine: for windows; keeps one connection while a window is read, and one more to move the slot.
        slot: name of the slot, which exists.
        publication: name of the publication.
        names: of types; may be kept from one reading to the next.

    Raises:
        WalError: it cannot begin, with the kind that says why.
    """
    if transport.kind == "stream":
        return await StreamReader.open(url, slot=slot, publication=publication, names=names)
    return WindowReader(engine, slot=slot, publication=publication, names=names)
