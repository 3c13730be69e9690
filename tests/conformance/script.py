"""A script: what clients and writers do, in order, and which frames each connection must receive.

Both kinds of scenario become scripts: the recordings of the real server (`recordings`) and our own files
(`scenario_file`). `player` plays them. Steps name connections and database sessions by short names; texts
may hold `{{name}}`, which is replaced by a token made from `Script.tokens` at the moment of playing.
"""

from dataclasses import dataclass, field
from typing import Any

from tests.conformance.frames import Frame


@dataclass(frozen=True, slots=True)
class Open:
    """Open a websocket at `path` below the stand-in's address."""

    conn: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Send:
    """Send one text frame."""

    conn: str
    text: str


@dataclass(frozen=True, slots=True)
class Close:
    """The client closes the connection."""

    conn: str


@dataclass(frozen=True, slots=True)
class Sql:
    """Run statements on a database session of their own name; `fails` when Postgres must refuse them."""

    text: str
    session: str = "main"
    fails: bool = False


@dataclass(frozen=True, slots=True)
class Copy:
    """COPY rows into a table."""

    table: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Fence:
    """Wait until every change committed before this moment has been judged and sent."""


@dataclass(frozen=True, slots=True)
class Expire:
    """Wait until every short-lived token that was sent has expired."""


@dataclass(frozen=True, slots=True)
class CheckPublication:
    """Let the server look at the publication now (the real one does so every 60 s)."""


@dataclass(frozen=True, slots=True)
class Receive:
    """A frame that must arrive on the connection; order counts among frames of one topic."""

    conn: str
    frame: Frame


@dataclass(frozen=True, slots=True)
class Refused:
    """The handshake that was just tried must be refused with this status and body."""

    conn: str
    status: int
    body: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The server must close the connection with this code."""

    conn: str
    code: int


Step = Open | Send | Close | Sql | Copy | Fence | Expire | CheckPublication | Receive | Refused | Closed


@dataclass(frozen=True, slots=True)
class Token:
    """Claims of a token; `lifetime` in seconds from its making (None: no `exp`), `valid`: rightly signed."""

    claims: dict[str, Any]
    lifetime: float | None = None
    valid: bool = True


@dataclass(slots=True)
class Script:
    """A scenario ready to be played; `settings` are the stand-in's, `commits` the recorded times by label."""

    name: str
    steps: list[Step] = field(default_factory=list)
    tokens: dict[str, Token] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
