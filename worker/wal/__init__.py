"""Reading the write-ahead log: a durable slot, and what comes out of it as changes with positions.

It knows nothing of handlers, lanes or Redis, and decides nothing about how far the slot may move: it is told.
"""

from worker.wal.failures import (
    NotPermittedError,
    ReadingLostError,
    SlotBusyError,
    SlotLostError,
    SlotMissingError,
    WalError,
)
from worker.wal.reader import Reader, Transport, WalBatch, choose_transport, open_reader
from worker.wal.stream import StreamReader
from worker.wal.windows import WindowReader

__all__ = [
    "NotPermittedError",
    "Reader",
    "ReadingLostError",
    "SlotBusyError",
    "SlotLostError",
    "SlotMissingError",
    "StreamReader",
    "Transport",
    "WalBatch",
    "WalError",
    "WindowReader",
    "choose_transport",
    "open_reader",
]
