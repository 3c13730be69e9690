"""What the demo shows while it runs: the listener's `/status`, and how late derived rows come.

Only reads. Nothing here decides whether the demo was right; see comparison.py.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

from examples.demo.database import Connection

_ANSWER_SECONDS = 6.0
_LATEST = 5_000

_LAGS = f"""
select
  percentile_cont(0.5) within group (order by seconds) filter (where at > clock_timestamp() - interval '2 s'),
  percentile_cont(0.5) within group (order by seconds),
  percentile_cont(0.99) within group (order by seconds)
from (select at, seconds from shop.lags order by id desc limit {_LATEST}) latest
"""  # noqa: S608 - a constant number
_ALL_LAGS = """
select null, percentile_cont(0.5) within group (order by seconds),
       percentile_cont(0.99) within group (order by seconds) from shop.lags
"""


@dataclass(frozen=True)
class Lag:
    """Seconds from the commit of an order to the commit of its derived row; None where there is none yet."""

    now: float | None = None
    p50: float | None = None
    p99: float | None = None

    def __str__(self) -> str:
        return f"p50 {_duration(self.p50)}, p99 {_duration(self.p99)}"

    @property
    def latest(self) -> str:
        """The median of the last two seconds."""
        return _duration(self.now)


@dataclass(frozen=True)
class Observation:
    """One look.

    Attributes:
        status: as `/status` gives it; empty when the listener does not answer.
        lag: of the latest derived rows.
    """

    status: Mapping[str, Any] = field(default_factory=dict[str, Any])
    lag: Lag = field(default_factory=Lag)

    @property
    def ready(self) -> bool:
        """Whether every commit from now on will be delivered."""
        return bool(self.status.get("ready"))

    @property
    def reasons(self) -> list[str]:
        """Why it is not ready."""
        return list(self.status.get("reasons", ["the listener does not answer"]))

    @property
    def handlers(self) -> dict[str, Mapping[str, Any]]:
        """The counters of each handler, by the short form of its name."""
        return {name.rpartition(":")[2]: counts for name, counts in self.status.get("handlers", {}).items()}

    @property
    def waiting(self) -> int:
        """Changes that are queued, held or parked, and backfills that are not done; -1 when nobody knows."""
        if not self.handlers:
            return -1
        counts = [one[name] for one in self.handlers.values() for name in ("queued", "held", "parked")]
        if None in counts:
            return -1
        return int(sum(counts)) + len(self.status.get("backfills", []))

    @property
    def applied(self) -> int:
        """Changes applied by all handlers together."""
        return sum(int(one["applied"]) for one in self.handlers.values())


class Observer:
    """Looks at the listener and at the shop's stopwatch."""

    def __init__(self, health_url: str, db: Connection) -> None:
        self._health_url = health_url
        self._db = db

    async def look(self, *, all_lags: bool = False) -> Observation:
        """Look once; a listener that does not answer is no error."""
        status = await get_json(f"{self._health_url}/status")
        row = await self._db.fetchrow(_ALL_LAGS if all_lags else _LAGS)
        return Observation(status, Lag(*row))


async def get_json(url: str) -> Mapping[str, Any]:
    """GET a small JSON object over HTTP; an empty one when nobody answers in time."""
    parts = urlsplit(url)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n"
    writer = None
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.write(request.encode())
            answer = await reader.read(-1)
        content = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (OSError, TimeoutError, ValueError):
        return {}
    finally:
        if writer is not None:
            writer.close()
    return cast("Mapping[str, Any]", content) if isinstance(content, dict) else {}


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
