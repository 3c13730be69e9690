"""Supabase Realtime as a source of changes, made survivable.

frames (pure) → session (one socket) → ledger (what is subscribed, received, lost) → source (survives). The
client library is behind `connection`. Lanes, handlers and the write-ahead log are not known here.
"""

from worker.realtime.buffer import Buffer
from worker.realtime.ledger import Counts
from worker.realtime.source import CANARY_TABLE, RealtimeSource
from worker.realtime.timing import Timing

__all__ = ["CANARY_TABLE", "Buffer", "Counts", "RealtimeSource", "Timing"]
