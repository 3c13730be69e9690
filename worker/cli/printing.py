"""How handlers, findings and state look on standard output: tables for people, JSON for programs.

Knows no settings source and opens nothing. JSON has the same content as the table, under stable names.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from config.settings import Tunables

if TYPE_CHECKING:
    from worker.check.findings import Finding
    from worker.registry import Handler

_STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
_COUNTS = ("read", "filtered", "applied", "held", "parked", "dead", "queued", "lag_seconds", "paused")


def describe(handler: "Handler", tunables: Tunables) -> dict[str, Any]:
    """Return a handler with the options in force, the settings' values filled in."""

    def chosen(option: Any, setting: Any) -> Any:  # noqa: ANN401 - a number of either kind
        return setting if option is None else option

    return {
        "name": handler.name,
        "kind": handler.kind,
        "subscriptions": [
            {
                "table": f"{one.schema}.{one.table}",
                "types": sorted(one.types),
                "filter": None if one.filter is None else str(one.filter),
                "columns": sorted(one.columns),
                "lane_key": None if one.lane_key is None else list(one.lane_key),
            }
            for one in handler.subscriptions
        ],
        "batch": chosen(handler.batch, tunables.batch),
        "max_attempts": chosen(handler.max_attempts, tunables.max_attempts),
        "backoff_seconds": chosen(handler.backoff, tunables.backoff_seconds),
        "backoff_max_seconds": chosen(handler.backoff_max, tunables.backoff_max_seconds),
        "timeout_seconds": chosen(handler.timeout, tunables.handler_timeout),
        "role": handler.role,
        "all_keys": handler.all_keys is not None,
    }


def show_handlers(described: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the handlers."""
    if as_json:
        _print_json(described)
        return
    table = Table(
        "handler", "kind", "table", "types", "only", "lane key", "batch", "attempts", "timeout", "role"
    )
    for handler in described:
        options = [handler["batch"], handler["max_attempts"], f"{handler['timeout_seconds']:g} s"]
        cells = [handler["name"], handler["kind"], *map(str, options), handler["role"] or ""]
        for one in handler["subscriptions"]:
            only = [one["filter"]] if one["filter"] else []
            only += [f"if {' or '.join(one['columns'])} changed"] if one["columns"] else []
            where = [
                one["table"],
                ", ".join(one["types"]),
                "; ".join(only),
                ", ".join(one["lane_key"] or ["primary key"]),
            ]
            table.add_row(*(Text(cell) for cell in (*cells[:2], *where, *cells[2:])))
            cells = [""] * len(cells)  # a handler's second table stands under its first
    _console().print(table)


def show_findings(findings: Sequence["Finding"], *, as_json: bool) -> None:
    """Print what a check found."""
    if as_json:
        good = all(found.state != "problem" for found in findings)
        _print_json({"ok": good, "findings": [found._asdict() for found in findings]})
        return
    console = _console()
    width = max((len(found.name) for found in findings), default=0)
    for found in findings:
        line = Text(f"{found.state:8} ", style=_STYLES[found.state]) + Text(
            f"{found.name:{width}}  {found.detail}"
        )
        console.print(line, soft_wrap=True)
        if found.remedy:
            # Not wrapped: remedies are there to be copied.
            console.print(Text(f"{'':8} {'':{width}}  → {found.remedy}"), soft_wrap=True)


def show_problem(problem: str) -> None:
    """Print one line on standard error."""
    sys.stderr.write(f"tailrace: {' '.join(problem.split())}\n")


def show_status(told: Mapping[str, Any], *, as_json: bool) -> None:
    """Print the state."""
    if as_json:
        _print_json(told)
        return
    console = _console()
    ready = "ready" if told.get("ready") else "not ready"
    style = _STYLES["ok" if told.get("ready") else "problem"]
    console.print(
        Text(ready, style=style) + Text(f", {told.get('delivery') or 'no'} delivery"), soft_wrap=True
    )
    for reason in told.get("reasons", ()):
        console.print(Text(f"  {reason}"), soft_wrap=True)
    table = Table("handler", *_COUNTS)
    for name, counts in told.get("handlers", {}).items():
        table.add_row(Text(name), *(Text(_cell(counts.get(one))) for one in _COUNTS))
    console.print(table)
    if (found := told.get("verification")) is not None:
        _show_recount(console, found)
    for word in ("gaps", "workers", "backfills"):
        console.print(Text(f"{word}: {len(told.get(word, ()))}"))


def _show_recount(console: Console, found: Mapping[str, Any]) -> None:
    good = "all accounted for" if found["ok"] else "not accounted for"
    console.print(Text(f"counted again: {good}", style=_STYLES["ok" if found["ok"] else "problem"]))
    for line in (*found["problems"], *found["notes"]):
        console.print(Text(f"  {line}"), soft_wrap=True)
    if found["log"] is not None:
        part = f"  log from {found['log']['from']} to {found['log']['to']}: {found['log']['changes']} changes"
        console.print(Text(part))
    table = Table("handler", "queued", "unread", "missing", "phantom")
    for name, counts in found["handlers"].items():
        table.add_row(Text(name), *(str(count) for count in counts.values()))
    console.print(table)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _console() -> Console:
    # Into a file or a pipe a table must not be squeezed into 80 columns.
    return Console() if sys.stdout.isatty() else Console(width=200)


def _print_json(content: object) -> None:
    sys.stdout.write(orjson.dumps(content, default=str, option=orjson.OPT_INDENT_2).decode() + "\n")
