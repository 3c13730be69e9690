"""What the manual says of each command beyond its options: examples, and what its exit codes mean.

Light, for `--help` shows it; `worker.cli.reference` makes docs/cli.md of it, and a test tries every example.
"""

from collections.abc import Mapping
from typing import Final, NamedTuple

ENTRY: Final = "python -m worker"


class Example(NamedTuple):
    """A command line as a person would type it."""

    purpose: str
    words: str
    """After the entry."""


class Manual(NamedTuple):
    """Of one command."""

    examples: tuple[Example, ...]
    exits: str = ""
    """What 0 and 1 mean, where it is more than that it went well."""
    pages: tuple[str, ...] = ()
    """Where to read on: files of docs/, with anchors."""


_SERVES: Final = "0: ended as asked, by SIGTERM or SIGINT. 1: a fault of the program; start it again."
_ASKS: Final = "0: done. 1: refused, with a line for each reason, or Postgres cannot be asked."

MANUAL: Final[Mapping[str, Manual]] = {
    "listen": Manual(
        (Example("the one that reads; a second one, anywhere, stands by", "listen"),),
        _SERVES,
        ("operations.md#run", "operations.md#health"),
    ),
    "work": Manual(
        (Example("one worker; start as many as you like, on any machines", "work"),),
        _SERVES,
        ("operations.md#run",),
    ),
    "run": Manual(
        (Example("everything on one machine", "run"),),
        "the worst of its processes' codes.",
        ("operations.md#run",),
    ),
    "migrate": Manual(
        (
            Example("make or update all tables; may be repeated, and run by two releases at once", "migrate"),
            Example("read the statements for Tailrace's own tables first", "migrate --sql"),
        ),
        "0: up to date. 2: Postgres could not be reached, or refused; nothing was migrated.",
        ("operations.md#install", "operations.md#upgrade"),
    ),
    "handlers": Manual(
        (
            Example("see what is subscribed to, and with which options", "handlers"),
            Example("the same for a program", "handlers --json"),
        ),
        "0: they can be loaded.",
    ),
    "check": Manual(
        (
            Example("see what is wrong, and what mends it", "check"),
            Example("mend what is safe, after being asked", "check --fix"),
            Example("the same in a deployment, as one document", "check --fix --yes --json"),
            Example("drop a replication slot that nobody reads", "check --fix --drop-slot old_slot"),
        ),
        "0: no problem. 1: a problem was found, or something could not be mended.",
        ("operations.md#check",),
    ),
    "status": Manual(
        (
            Example("see what happens now", "status"),
            Example("count again what is in the log, in Redis and in Postgres", "status --verify"),
            Example("the same for a script", "status --json"),
        ),
        "0: ready, or with --verify all is accounted for. 1: it is not, or nobody can be asked.",
        ("operations.md#health", "operations.md#is-anything-missing"),
    ),
    "models": Manual(
        (
            Example("write models of schema public", "models --out shop/models.py"),
            Example("of some tables, to standard output", "models --tables orders,shop.stock"),
            Example("see in CI whether the file is still true", "models --out shop/models.py --check"),
        ),
        "0: written, or still true. 1: the database says something else than the file.",
        ("supabase.md#models",),
    ),
    "backfill": Manual(
        (
            Example("give all rows of a table to the derive handlers that follow it", "backfill orders"),
            Example(
                "to one of them, at most 500 rows a second", "backfill orders --handler totals --rate 500"
            ),
            Example("all rows to a change handler, as INSERTs", "backfill orders --handler copy"),
            Example("only some rows", "backfill shop.orders --where \"created_at >= '2026-01-01'\""),
            Example(
                "follow the one that is under way, or have a cancelled one go on", "backfill orders --resume"
            ),
            Example("stop it after the page in hand", "backfill orders --cancel"),
            Example("list all", "backfill"),
        ),
        "0: asked for, or done where it waited. 1: refused, or cancelled while it waited.",
        ("operations.md#backfills-by-hand",),
    ),
    "dead-letters list": Manual(
        (
            Example("see what was given up", "dead-letters list"),
            Example(
                "by what failed, in the last hour", "dead-letters list --error-class TimeoutError --since 1h"
            ),
        ),
        _ASKS,
        ("operations.md#dead-letters",),
    ),
    "dead-letters show": Manual(
        (Example("read one: rows, error, traceback, hint, decisions", "dead-letters show 42"),),
        _ASKS,
        ("operations.md#dead-letters",),
    ),
    "dead-letters redrive": Manual(
        (
            Example("try two of them again", "dead-letters redrive 42 43"),
            Example("see which would be meant", "dead-letters redrive --handler totals --since 2h --dry-run"),
            Example("all of a handler", "dead-letters redrive --handler totals"),
            Example(
                "with another value in its record",
                """dead-letters redrive 42 --record '{"status": "paid"}'""",
            ),
        ),
        _ASKS,
        ("operations.md#dead-letters",),
    ),
    "dead-letters discard": Manual(
        (
            Example("forget one", "dead-letters discard 42"),
            Example("forget every one of a table", "dead-letters discard --table public.orders"),
        ),
        _ASKS,
        ("operations.md#dead-letters",),
    ),
    "lanes list": Manual(
        (
            Example("see what is paused, and what waits", "lanes list"),
            Example("of one handler", "lanes list totals"),
        ),
        _ASKS,
        ("operations.md#pausing",),
    ),
    "lanes pause": Manual(
        (
            Example("let all changes of a handler wait in Postgres", "lanes pause totals"),
            Example("or those of one key", "lanes pause totals --lane-key 7"),
            Example("of a key of several columns", "lanes pause totals --lane-key '[\"eu\", 7]'"),
        ),
        _ASKS,
        ("operations.md#pausing",),
    ),
    "lanes resume": Manual(
        (
            Example("let a handler go on", "lanes resume totals"),
            Example("or one key", "lanes resume totals --lane-key 7"),
        ),
        _ASKS,
        ("operations.md#pausing",),
    ),
}


def epilog(command: str) -> str:
    """Give what `--help` of a command ends with: its examples and exit codes."""
    manual = MANUAL[command]
    parts = [f"# {example.purpose}\n{ENTRY} {example.words}" for example in manual.examples]
    if manual.exits:
        parts.append(f"Exit codes: {manual.exits}")
    return "Examples:\n\n" + "\n\n".join(parts)


__all__ = ["ENTRY", "MANUAL", "Example", "Manual", "epilog"]
