"""Which delivery the payloads come by, and why. Pure; says nothing about how either works."""

from typing import Literal, NamedTuple

from worker.errors import ConfigurationError


class Choice(NamedTuple):
    """A delivery, with the reason in words."""

    delivery: Literal["plain", "proven"]
    reason: str


def choose(wanted: Literal["auto", "proven", "plain"]) -> Choice:
    """Choose the delivery.

    Args:
        wanted: value of WORKER_DELIVERY.

    Raises:
        ConfigurationError: what is wanted cannot be had.
    """
    if wanted == "proven":
        problem = (
            "WORKER_DELIVERY=proven: proven delivery is not part of this version yet;"
            " use `plain`, or `auto`, which will take it once it is there"
        )
        raise ConfigurationError([problem])
    if wanted == "plain":
        return Choice("plain", "WORKER_DELIVERY=plain")
    return Choice("plain", "WORKER_DELIVERY=auto: proven delivery is not part of this version yet")
