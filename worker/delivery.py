"""Which delivery the payloads come by, and why. Pure; says nothing about how either works."""

from typing import Literal, NamedTuple

from worker.errors import ConfigurationError

Wanted = Literal["auto", "proven", "plain"]


class Choice(NamedTuple):
    """A delivery, with the reason in words."""

    delivery: Literal["plain", "proven"]
    reason: str


def choose(wanted: Wanted, *, allowed: bool = True, why_not: str = "") -> Choice:
    """Choose the delivery.

    Args:
        wanted: value of WORKER_DELIVERY.
        allowed: whether the database's user may have a replication slot.
        why_not: why it may not, with the remedy.

    Raises:
        ConfigurationError: what is wanted cannot be had.
    """
    if wanted == "proven" and not allowed:
        raise ConfigurationError([f"WORKER_DELIVERY=proven: {why_not}"])
    if wanted == "auto":
        return Choice("plain", "WORKER_DELIVERY=auto: proven delivery is a preview, and must be asked for")
    return Choice(wanted, f"WORKER_DELIVERY={wanted}")
