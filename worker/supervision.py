"""Tells a service manager how this process does: that it is up, what it does, that it gets on, that it ends.

The protocol is systemd's sd_notify(3): datagrams to a Unix socket. Its watchdog hears of progress, not of
time: a process that does not get on (see pulse.py) is silent, and is started again.
"""

import asyncio
import contextlib
import socket
from typing import Protocol, Self

import structlog

from config.supervisor import Supervisor

log = structlog.get_logger(__name__)

LOOK_SECONDS = 2.0
EAGER_SECONDS = 0.1


class Supervised(Protocol):
    """A process that can tell how it does."""

    def live(self) -> tuple[bool, list[str]]:
        """Tell whether it gets on, and if not, what does not."""
        ...

    def doing(self) -> str:
        """Tell in a few words what it does, or for what it waits; nothing while it is still starting."""
        ...


async def attend(supervisor: Supervisor, process: Supervised) -> None:
    """Report for ever; returns at once where nobody wants to hear it.

    A process that waits for Postgres or Redis is up: no new start brings those back, and none of the units
    that come after it should wait for them.
    """
    if supervisor.address is None:
        return
    every = LOOK_SECONDS
    if supervisor.watchdog_seconds is not None:
        every = min(every, supervisor.watchdog_seconds / 4)
    told, up, stuck = "", False, False
    with _Reports(supervisor.address) as reports:
        try:
            while True:
                live, reasons = process.live()
                doing = process.doing() if live else f"stuck: {'; '.join(reasons)}"
                words = []
                if doing and not up:
                    up = True
                    words.append("READY=1")
                if doing != told:
                    told = doing
                    words.append(f"STATUS={doing}")
                if live:
                    words.append("WATCHDOG=1")
                elif not stuck:
                    log.error("the process does not get on", reasons=reasons)
                stuck = not live
                reports.send(words)
                await asyncio.sleep(every if up else min(every, EAGER_SECONDS))
        finally:
            reports.send(["STOPPING=1", "STATUS=stopping"])


async def end(reports: "asyncio.Task[None]") -> None:
    """End what `attend` does, with its last report."""
    reports.cancel()
    await asyncio.wait({reports})


class _Reports:
    """The way to the service manager; one that is not there is no reason to end."""

    def __init__(self, address: str) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address

    def __enter__(self) -> Self:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(0)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def send(self, words: list[str]) -> None:
        """Send a report; lines end where the protocol's do."""
        text = "\n".join(word.replace("\n", " ") for word in words)
        if text:
            with contextlib.suppress(OSError):  # the next one is due in a moment
                self._socket.sendto(text.encode(), self._address)


__all__ = ["Supervised", "attend", "end"]
