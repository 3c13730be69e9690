"""What a service manager that has started this process wants to hear, and where (systemd's sd_notify(3)).

No settings: systemd puts these into the environment of a unit with `Type=notify`, and nobody else does.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple


class Supervisor(NamedTuple):
    """Whoever has started this process."""

    address: str | None
    """Path of its socket, or the name of an abstract one after an `@`; None where nobody listens."""
    watchdog_seconds: float | None
    """It ends a process that has not reported for so long; None where it does not."""


def read_supervisor(environment: Mapping[str, str] = os.environ, pid: int | None = None) -> Supervisor:
    """Read who has started this process; nobody where it was not meant for this one, but for a parent."""
    address = environment.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return Supervisor(None, None)
    watched = environment.get("WATCHDOG_USEC", "")
    meant = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid() if pid is None else pid))
    seconds = int(watched) / 1_000_000 if meant and watched.isdecimal() and int(watched) else None
    return Supervisor(address, seconds)


__all__ = ["Supervisor", "read_supervisor"]
