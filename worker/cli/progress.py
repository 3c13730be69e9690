"""How far long work is, on standard error: a bar where that is a terminal, and nothing elsewhere.

Whoever works is given a function to tell how much is done, and knows nothing of terminals.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Told = Callable[[int, int | None], None]
"""Takes what is done by now, and of how much; None where nobody knows."""


def columns(unit: Literal["things", "bytes"]) -> tuple[ProgressColumn, ...]:
    """Give what a bar shows: how much of how much, how fast, how long already, how long still."""
    many: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    if unit == "bytes":
        many = (DownloadColumn(), TransferSpeedColumn())
    head = (TextColumn("{task.description}"), BarColumn())
    return (*head, *many, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())


def bars(unit: Literal["things", "bytes"] = "things") -> Progress:
    """Give an empty set of bars. They go when the work is done: what came of it is told by others."""
    console = Console(stderr=True)
    return Progress(*columns(unit), console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def progress(what: str, unit: Literal["things", "bytes"] = "things") -> Iterator[Told]:
    """Show one bar; gives the function by which it is moved."""
    with bars(unit) as shown:
        task = shown.add_task(what, total=None, rate="")

        def told(done: int, total: int | None) -> None:
            speed = shown.tasks[task].speed
            shown.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

        yield told
