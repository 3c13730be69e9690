"""How the demo looks: a live panel on a terminal, else a plain line every few seconds.

Only shows; everything it shows is handed to it.
"""

import time
from collections import deque
from dataclasses import dataclass
from typing import Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from examples.demo.observation import Lag, Observation
from examples.demo.shop import Shop

_LINE_SECONDS = 3.0
_RATE_SECONDS = 5.0


@dataclass(frozen=True)
class Addresses:
    """What a person may want to open beside the demo."""

    health: str
    database: str


class View:
    """Shows the demo to whoever started it."""

    def __init__(self, ends_after: float | None) -> None:
        self._console = Console(highlight=False)
        self._ends_after = ends_after
        self._began = time.monotonic()
        self._shown = 0.0
        self._marks: deque[tuple[float, int]] = deque()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.freeze()

    def say(self, text: str, style: str = "") -> None:
        """Print a line of its own."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def open(self, addresses: Addresses) -> None:
        """Begin to show changes."""
        self._began = time.monotonic()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        else:
            self.say(f"health: {addresses.health}/readyz and {addresses.health}/status")
            self.say(f"database: {addresses.database}")

    def freeze(self) -> None:
        """Leave the live panel as it is."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def show(self, seen: Observation, shop: Shop, addresses: Addresses, doing: str = "") -> None:
        """Show the present state; without a terminal, not more often than every few seconds."""
        now = time.monotonic()
        rate = self._rate(now, shop.changes)
        if self._live is not None:
            self._live.update(self._panel(seen, shop, addresses, rate, doing), refresh=True)
        elif now - self._shown >= _LINE_SECONDS:
            self._shown = now
            applied = ", ".join(f"{name} {one['applied']:,}" for name, one in seen.handlers.items())
            state = "ready" if seen.ready else "NOT READY: " + "; ".join(seen.reasons)
            self.say(
                f"{now - self._began:4.0f} s  {shop.changes:,} changes committed, {rate:.0f}/s;"
                f" applied: {applied or 'nothing yet'}; lag {seen.lag}; {doing or state}"
            )

    def _rate(self, now: float, changes: int) -> float:
        self._marks.append((now, changes))
        while len(self._marks) > 2 and now - self._marks[0][0] > _RATE_SECONDS:  # noqa: PLR2004 - a rate has two ends
            self._marks.popleft()
        seconds = now - self._marks[0][0]
        return (changes - self._marks[0][1]) / seconds if seconds else 0.0

    def _panel(self, seen: Observation, shop: Shop, addresses: Addresses, rate: float, doing: str) -> Panel:
        facts = Table.grid(padding=(0, 2))
        facts.add_column(style="dim")
        facts.add_column()
        facts.add_row("shop", _shop(shop, rate))
        facts.add_row("lag", _lag(seen.lag))
        facts.add_row("listener", _listener(seen))
        facts.add_row("realtime", _realtime(seen))
        facts.add_row("workers", f"{len(seen.status.get('workers', []))}")
        gaps = len(seen.status.get("gaps", []))
        facts.add_row("gaps", Text(str(gaps), style="yellow" if gaps else ""))
        more = Table.grid(padding=(0, 2))
        more.add_column(style="dim")
        more.add_column(overflow="fold")
        more.add_row("health", f"{addresses.health}/readyz  /livez  /status")
        more.add_row("database", addresses.database)
        more.add_row("stop", doing or self._stop())
        title = f"Tailrace · {seen.status.get('delivery') or 'no'} delivery"
        return Panel(Group(facts, "", _handlers(seen), "", more), title=title, expand=False)

    def _stop(self) -> str:
        if self._ends_after is None:
            return "Ctrl-C"
        left = max(0.0, self._ends_after - (time.monotonic() - self._began))
        return f"by itself in {left:.0f} s, or Ctrl-C"


def _shop(shop: Shop, rate: float) -> Text:
    text = Text(f"{shop.changes:,} changes committed", style="bold")
    return text.append(f" in {shop.counts['transactions']:,} transactions, {rate:.0f} changes/s", style="")


def _lag(lag: Lag) -> str:
    now = "" if lag.now is None else f"now {lag.latest}, "
    return f"{now}{lag}, from the commit of a change to the commit of its derived row"


def _listener(seen: Observation) -> Text:
    if seen.ready:
        return Text("ready", style="green")
    return Text("not ready: " + "; ".join(seen.reasons), style="bold red")


def _realtime(seen: Observation) -> Text:
    realtime = seen.status.get("realtime", {})
    if not realtime.get("subscribed"):
        return Text("connected, not subscribed" if realtime.get("connected") else "not connected", "bold red")
    canary = realtime.get("canary_seconds")
    text = Text("subscribed", style="green")
    return (
        text if canary is None else text.append(f", the last canary came back {canary:.0f} s ago", "default")
    )


def _handlers(seen: Observation) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("handler")
    for heading in ("applied", "queued", "held", "dead", "oldest queued"):
        table.add_column(heading, justify="right")
    for name, one in seen.handlers.items():
        lag = one.get("lag_seconds") or 0.0
        counts = [one[count] for count in ("applied", "queued", "held", "dead")]
        cells = ["-" if count is None else f"{count:,}" for count in counts]
        table.add_row(name, *cells, f"{lag:.2f} s" if lag else "")
    return table
