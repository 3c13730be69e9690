"""Which delivery the payloads come by, and why. Pure; says nothing about how either works."""

from typing import Literal, NamedTuple

from worker.errors import ConfigurationError

Wanted = Literal["auto", "proven", "plain", "webhooks"]


UNPROTECTED = (
    "WORKER_DELIVERY=webhooks needs WORKER_HOOK_SECRET: at least 16 characters, the same as in the webhooks'"
    " header Authorization"
)


class Choice(NamedTuple):
    """A delivery, with the reason in words."""

    delivery: Literal["plain", "proven"]
    reason: str


def choose(wanted: Wanted, *, allowed: bool = True, why_not: str = "", taken: str = "") -> Choice:
    """Choose the delivery: proven wherever it can be had, unless plain is asked for.

    Args:
        wanted: value of WORKER_DELIVERY.
        allowed: whether the database's user may have the replication slot.
        why_not: why it may not, with the remedy.
        taken: why a slot of that name is not ours, or empty. Who asks for proven delivery waits for it.

    Raises:
        ConfigurationError: what is wanted cannot be had.
    """
    if wanted == "webhooks":
        return Choice("plain", "WORKER_DELIVERY=webhooks: payloads as the database's webhooks send them")
    if wanted == "plain":
        return Choice("plain", "WORKER_DELIVERY=plain")
    if wanted == "auto" and allowed and taken:
        allowed, why_not = False, taken
    if allowed:
        can = ": the database allows the replication slot" if wanted == "auto" else ""
        return Choice("proven", f"WORKER_DELIVERY={wanted}{can}")
    if wanted == "proven":
        raise ConfigurationError([f"WORKER_DELIVERY=proven: {why_not}"])
    return Choice("plain", f"WORKER_DELIVERY=auto, and proven delivery cannot be had: {why_not}")
