"""What a check says of one part. Plain values."""

from typing import Literal, NamedTuple

State = Literal["ok", "warning", "problem", "skipped"]


class Finding(NamedTuple):
    """One thing examined."""

    name: str
    """The part: settings, handlers, delivery, slot, database, migrations, publication, tables,
    grants, redis, realtime."""
    state: State
    detail: str
    """What was found, in one line without secrets."""
    remedy: str = ""
    """What mends it; empty where the detail says so already."""
