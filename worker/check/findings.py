"""What a check says of one part, and what mends it. Plain values."""

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

State = Literal["ok", "note", "warning", "problem", "skipped"]

# What changes the catalogue alone, can be taken back, and takes nothing away from anybody.
_HARMLESS = re.compile(
    r"(create publication|alter publication \S+ add table|alter publication \S+ set \(publish =|"
    r"alter table \S+ replica identity full|grant )"
)


class Fix(NamedTuple):
    """One step that mends something without harm, as it can be run and shown."""

    by: Literal["sql", "redis", "migrate"]
    words: str
    slot: str = ""
    """The replication slot that it drops: it is done for one who has named that slot, and else never."""


class Finding(NamedTuple):
    """One thing examined."""

    name: str
    """The part, such as `settings`, `grants` or `redis`; docs/operations.md lists them."""
    state: State
    """`note` is for what is as it may be, and good to know."""
    detail: str
    """What was found, in one line without secrets."""
    remedy: str = ""
    """What mends it; empty where the detail says so already."""
    fixes: tuple[Fix, ...] = ()
    """The same as steps, where they are safe to be run by a program."""

    @property
    def is_wrong(self) -> bool:
        """Tell whether there is something to be mended."""
        return self.state in ("problem", "warning")

    def told(self) -> dict[str, Any]:
        """Give it as JSON can have it."""
        said: dict[str, Any] = {
            "name": self.name,
            "state": self.state,
            "detail": self.detail,
            "remedy": self.remedy,
        }
        return said | {"fixes": [fix.words for fix in self.fixes]}


def by_sql(name: str, state: State, detail: str, *statements: str) -> Finding:
    """Make a finding that statements mend; those that are harmless, all of them, can be run by `--fix`."""
    fixes = tuple(Fix("sql", one) for one in statements)
    safe = all(_HARMLESS.match(one) for one in statements)
    return Finding(name, state, detail, "run: " + " ".join(statements), fixes if safe else ())


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:  # noqa: PLR2004 - from each unit to the next
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def listed(names: Iterable[str], most: int = 5) -> str:
    """Name things for people, a few of them."""
    there = list(names)
    more = len(there) - most
    return ", ".join(there[:most]) + (f" and {more} more" if more > 0 else "")
