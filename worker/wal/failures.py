"""Why the log cannot be read, as exceptions, and from which answer of Postgres each follows.

WalError                    base: one line, with what to do
├── ReadingLostError        the connection or the cursor went; read again, with a new generation
├── SlotBusyError           another session reads from the slot
├── SlotMissingError        there is no such slot (or no such publication)
├── SlotLostError           the slot no longer has the log it would need: it must be made anew, with a gap
└── NotPermittedError       the user may not replicate, or the connection does not allow it
"""

from typing import Final

from worker.errors import TailraceError


class WalError(TailraceError):
    """The write-ahead log cannot be read."""


class ReadingLostError(WalError):
    """Reading ended in the midst; nothing is known to be wrong with the slot."""


class SlotBusyError(WalError):
    """Another session reads from the slot."""


class SlotMissingError(WalError):
    """The slot, or the publication, does not exist."""


class SlotLostError(WalError):
    """The slot exists, but the log it needs is gone."""


class NotPermittedError(WalError):
    """This user, or this connection, may not replicate."""


_BY_SQLSTATE: Final[dict[str, type[WalError]]] = {
    "55006": SlotBusyError,  # object_in_use
    "42704": SlotMissingError,  # undefined_object
    "55000": SlotLostError,  # object_not_in_prerequisite_state: "can no longer access replication slot"
    "42501": NotPermittedError,  # insufficient_privilege
    "28000": NotPermittedError,  # no entry in pg_hba.conf
    "0A000": NotPermittedError,  # "cannot execute … in …", and what poolers refuse
}


def failure(sqlstate: str | None, message: str, doing: str) -> WalError:
    """Make the exception that an error of Postgres stands for.

    Args:
        sqlstate: its code, if it has one.
        message: its first line.
        doing: what was being done, as a beginning of the sentence.
    """
    kind = _BY_SQLSTATE.get(sqlstate or "", ReadingLostError)
    return kind(f"{doing}: {message.splitlines()[0] if message else 'no reason given'}")
