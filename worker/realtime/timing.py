"""How long the parts of the Realtime source wait. One place, so that tests can run on short times."""

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """Every wait, in seconds, with the reason for its length."""

    open: float = 15.0
    """TCP, TLS and handshake; Realtime holds a refusal back for about 2 s."""
    close: float = 1.0
    """Closing handshake; a server that does not answer it is left behind."""
    heartbeat: float = 10.0
    """Between heartbeats; Realtime closes a socket on which it heard nothing for about 60 s."""
    heartbeat_reply: float = 10.0
    """For any frame after a heartbeat; then the socket counts as half-open."""
    join: float = 15.0
    """For the reply to a join; Realtime holds a refusal back for 5 s."""
    acknowledge: float = 20.0
    """From the reply to "Subscribed"; the first subscription of a cold project takes about 3 s."""
    join_spacing: float = 0.02
    """Between two joins: 50 a second, half of what the smallest plan allows."""
    rejoin: float = 1.0
    """Before the first try to join a failed channel again; doubles with each failure."""
    rejoin_max: float = 30.0
    rejoin_limited: float = 30.0
    """Before joining again after a rate limit."""
    rejoin_refused: float = 60.0
    """Before joining again after a refusal that only a person can mend."""
    canary: float = 15.0
    """For a canary to come back; with 5 s between canaries silence is found within 20 s."""
    reconnect: float = 0.5
    """Bound of the first wait before a new socket; doubles with each failure, half of it random."""
    reconnect_max: float = 30.0
    refused: float = 10.0
    """Before knocking again where the handshake was refused; grows like the others, up to `refused_max`."""
    refused_max: float = 60.0
    renew: float = 20 * 3600.0
    """Age at which a socket is replaced: Realtime's own token for it lives 24 h with the new keys."""
    withheld: float = 10.0
    """Between two gaps for changes that Realtime announces and withholds, per table and reason."""


def backoff(first: float, most: float, failures: int) -> float:
    """Return the wait after so many failures (from 1), in seconds: doubling, bounded, half of it random."""
    bound = min(most, first * 2.0 ** min(failures - 1, 30))
    return bound * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, protects nothing
