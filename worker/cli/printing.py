"""How handlers, findings and state look on standard output: tables for people, JSON for programs.

Knows no settings source and opens nothing. JSON has the same content as the table, under stable names.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from config.settings import Tunables

if TYPE_CHECKING:
    from worker.check.findings import Finding
    from worker.registry import Handler

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "bold red", "skipped": "dim"}
_COUNTS = ("read", "filtered", "applied", "held", "parked", "dead", "queued", "lag_seconds", "paused")


def show_text(text: str) -> None:
    """Print a text as it is, for files and pipes."""
    sys.stdout.write(text)


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


class Step(NamedTuple):
    """Something that was run to mend what a check had found."""

    words: str
    error: str
    """Why it failed; empty where it did not."""


def show_findings(
    findings: Sequence["Finding"], *, as_json: bool, done: Sequence[Step] | None = None
) -> None:
    """Print what a check found, as JSON with what was run to mend it."""
    if as_json:
        good = all(found.state != "problem" for found in findings)
        told: dict[str, Any] = {"ok": good, "findings": [found.told() for found in findings]}
        if done is not None:
            told["ok"] = good and not any(one.error for one in done)
            told["ran"] = [one._asdict() for one in done]
        _print_json(told)
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
    if done is None and any(found.is_wrong and _is_safe(found) for found in findings):
        console.print(Text("what can be mended safely, `python -m worker check --fix` mends"), soft_wrap=True)


def _is_safe(found: "Finding") -> bool:
    return any(not fix.slot for fix in found.fixes)


def show_intended(statements: Sequence[str]) -> None:
    """Print what is to be run."""
    console = _console()
    console.print(Text("\nto be run:"))
    for one in statements:
        console.print(Text(f"  {one}"), soft_wrap=True)


def show_steps(steps: Sequence[Step]) -> None:
    """Print what was run."""
    console = _console()
    if not steps:
        console.print(Text("nothing was run"))
    for one in steps:
        state = "failed" if one.error else "ran"
        line = Text(f"{state:8} ", style=_STYLES["problem" if one.error else "ok"]) + Text(one.words)
        console.print(line, soft_wrap=True)
        if one.error:
            console.print(Text(f"{'':8} → {one.error}"), soft_wrap=True)


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


def show_dead_letters(letters: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print dead letters, or what was decided about them."""
    if as_json:
        _print_json(letters)
        return
    if not letters:
        _console().print("no dead letters")
        return
    words = ("id", "handler", "table", "type", "key", "attempts", "status", "error_class", "last_failed_at")
    decided = any("newer" in one for one in letters)
    table = Table(*(word.replace("_", " ") for word in words), *(["newer ones applied"] if decided else []))
    for one in letters:
        name = ".".join(part for part in (one["schema"], one["table"]) if part)
        told = {**one, "table": name, "key": _key(one["key"])}
        if "refused" in one:
            told["status"] = "refused"
        newer = _newer(one.get("newer")) if decided else ""
        table.add_row(*(Text(_cell(told[word])) for word in words), *([Text(newer)] if decided else []))
    _console().print(table)


def show_dead_letter(told: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one with all that is known of it."""
    if as_json:
        _print_json(told)
        return
    console = _console()
    for name, value in told.items():
        title = name.replace("_", " ")
        if name == "traceback" and value:
            console.print(Text(f"{title}:"))
            console.print(Text(value.rstrip()), soft_wrap=True)
        elif isinstance(value, dict):
            console.print(Text(f"{title}:"))
            for column, content in value.items():
                console.print(Text(f"  {column:20} {_cell(content)}"), soft_wrap=True)
        elif name == "audit":
            console.print(Text(f"{title}: {len(value) or 'nothing decided yet'}"))
            for entry in value:
                line = f"  {entry['at']} {entry['action']} by {entry['who']} ({entry['via']})"
                console.print(Text(line), soft_wrap=True)
        else:
            console.print(Text(f"{title:20}   {_key(value)}"), soft_wrap=True)


def show_lanes(handlers: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the lanes of handlers."""
    if as_json:
        _print_json(handlers)
        return
    words = ("handler", "kind", "state", "paused", "lanes", "read", "applied", "held", "parked", "dead")
    table = Table(*words, "last moved", "paused keys")
    for one in handlers:
        cells = [_cell(one[word]) for word in (*words, "moved_at")]
        table.add_row(*map(Text, cells), Text("  ".join(one["paused_keys"])))
    _console().print(table)


def show_pause(told: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what came of pausing or resuming."""
    if as_json:
        _print_json(told)
        return
    what = f"lane key {told['lane_key']} of {told['handler']}" if told["lane_key"] else told["handler"]
    state = "paused" if told["paused"] else "going on"
    also = "" if told["changed"] else ", as before"
    more = told.get("paused_keys")
    keys = f"; {more} lane keys of it are paused" if more else ""
    _console().print(Text(f"{what} is {state}{also}{keys}"), soft_wrap=True)


def show_backfills(backfills: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print backfills."""
    if as_json:
        _print_json(backfills)
        return
    words = (
        "id",
        "handler",
        "state",
        "rows",
        "estimated",
        "keys",
        "rate",
        "condition",
        "asked_by",
        "asked_at",
    )
    table = Table("table", *(word.replace("_", " ") for word in words))
    for one in backfills:
        told = {**one, "asked_by": one["asked_by"] or f"gap {one['gap']}"}
        table.add_row(Text(f"{one['schema']}.{one['table']}"), *(Text(_cell(told[word])) for word in words))
    _console().print(table)


def _newer(told: Mapping[str, Any] | None) -> str:
    """Say how many newer changes were applied."""
    if told is None:
        return ""
    return f"{told['count']}, the last at {told['position']}" if told["count"] else "none"


def _key(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else _cell(value)


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
