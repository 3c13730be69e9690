"""Whether the slot is about to lose the log that it needs. Pure: judges what Postgres says of it.

`wal_status` alone tells it too late, and says "extended" also where nothing limits what is kept.
"""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from worker.wal.slot import SlotState

LEAST_SHARE: Final = 0.2
"""Of what the slot may keep: when less than this is left, it is in danger."""


def endangered(slot: "SlotState") -> str:
    """Say why the slot may soon lose its log, with what to do; empty while it is safe."""
    safe = slot.safe_wal_size
    if slot.wal_status == "unreserved":
        left = "Postgres may remove it at the next checkpoint"
    elif safe is not None and safe < LEAST_SHARE * (max(safe, 0) + slot.retained_bytes):
        left = f"{max(safe, 0)} more and Postgres removes it"
    else:
        return ""
    return (
        f"the replication slot keeps {slot.retained_bytes} bytes of the log; {left}: let the lanes drain,"
        f" or raise max_slot_wal_keep_size (now {slot.keep_size})"
    )
