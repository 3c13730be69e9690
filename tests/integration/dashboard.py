"""A listener as its dashboard sees it: a state that is made up, and a desk that remembers what is decided."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import Any

from starlette.routing import BaseRoute

from standin.server.tokens import project_key
from tests.unit.test_telemetry import handler, state
from worker.asked import Operator, Which
from worker.errors import Refused, Unknown
from worker.tokens import Tokens
from worker.web import Bearer, Served, desk_routes, health_app, page_routes, serve

SECRET = "a secret of the project, which is long enough"
KEY = project_key("service_role", SECRET)
HOSTILE = "<img src=x onerror=alert(1)>\"'`${alert(2)}</script><script>alert(3)</script>\n\ndata: {}"


def name_of(text: str) -> str:
    """Name a function, with more in its name than the loader allows; but addresses are made of it."""
    return " ".join(text.replace("/", "").split()) or "totals"


class Told:
    """A process that tells its state, and counts how often it was asked."""

    def __init__(self, handlers: int = 1, *, text: str = "") -> None:
        self.asked = 0
        self.broken = False
        self.handlers = {
            f"shop.handlers.{name_of(text)}{n}": handler(
                tables=[f"public.orders{n}{text}"],
                applied=1_000 * n,
                queued=n % 7,
                held=2 if n % 9 == 4 else 0,
                parked=500 if n % 11 == 3 else 0,
                dead=3 if n % 10 == 5 else 0,
                paused=n % 11 == 3,
                state="orphaned" if n % 17 == 16 else "active",
                kind="change" if n % 3 == 1 else "derive",
                lag_seconds=n * 9.0,
                lanes={
                    "count": 16,
                    "queued": [(n * k) % 5 for k in range(16)],
                    "holding": [int(n % 9 == 4 and k == 3) for k in range(16)],
                },
            )
            for n in range(handlers)
        }
        self.parts: dict[str, Any] = {}

    async def status(self) -> dict[str, Any]:
        """Tell it."""
        self.asked += 1
        if self.broken:
            raise RuntimeError("password=hunter2 is in this text")
        for one in self.handlers.values():
            one["applied"] += 7
        shown = {
            "ready": True,
            "reasons": [],
            "delivery": "proven",
            "reason": "the database allows the replication slot",
            # As of now: an answer is kept, and what a test changes later is not in it.
            "handlers": deepcopy(self.handlers),
            "gaps": [],
            "backfills": [],
            "limits": {"entries": 100, "bytes": 10_000},
        }
        shown["slot"] = state()["slot"] | {"name": "tailrace", "transport": "stream"}
        return state(**(shown | self.parts))

    # Of health_app
    def live(self) -> tuple[bool, list[str]]:
        """Tell."""
        return True, []

    async def ready(self) -> tuple[bool, list[str]]:
        """Tell."""
        return True, []

    def notes(self) -> list[str]:
        """Tell."""
        return []


class Remembering:
    """A desk on no database: what is decided there stands in `decided`."""

    def __init__(self, letters: int = 0, *, text: str = "") -> None:
        self.decided: list[tuple[Any, ...]] = []
        self.text = text
        self.dead = {n: self.letter(n, "dead") for n in range(1, letters + 1)}
        self.waiting = {n: self.letter(n, "retrying") for n in range(501, 501 + letters)}
        self.keys: list[str] = []
        self.fills: dict[int, dict[str, Any]] = {}

    def letter(self, id_: int, status: str) -> dict[str, Any]:
        """Make one."""
        more = {} if status == "dead" else {"next_attempt_at": "2026-01-31T09:01:00Z"}
        return more | {
            "id": id_,
            "handler": f"shop.handlers.{name_of(self.text)}5",
            "schema": "public",
            "table": f"orders{self.text}",
            "type": "UPDATE",
            "key": [f"key{self.text}", 42],
            "position": "0/16B3748:1",
            "attempts": 8,
            "status": status,
            "error_class": f"builtins.ValueError{self.text}",
            "error": f"the secret row value {id_}{self.text}",
            "first_failed_at": "2026-01-31T09:00:00Z",
            "last_failed_at": "2026-01-31T09:00:10Z",
        }

    async def find(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List dead letters."""
        del after
        return [one for one in self.dead.values() if which.handler in (None, one["handler"])][:most]

    async def held(
        self, which: Which, *, after: int | None = None, most: int | None = None
    ) -> list[dict[str, Any]]:
        """List what is held."""
        del which, after
        return list(self.waiting.values())[:most]

    async def show(self, id_: int) -> dict[str, Any]:
        """Tell all about one."""
        if id_ not in self.dead:
            raise Unknown(f"there is no dead letter {id_}")
        return self.dead[id_] | {
            "hint": f"Let the handler take it. {self.text}",
            "traceback": f"Traceback: the secret row value {self.text}",
            "halts": True,
            "record": {f"note{self.text}": f"secret note {self.text}", "large": 9007199254740993},
            "old_record": None,
            "newer": {"count": 2, "position": "0/16B3749:0"},
            "audit": [],
        }

    async def show_held(self, id_: int) -> dict[str, Any]:
        """Tell all about one."""
        return self.waiting[id_] | {"hint": None, "traceback": "", "halts": False, "record": None}

    async def lanes(self, handler: str | None = None) -> list[dict[str, Any]]:
        """Tell what is paused."""
        return [{"handler": handler or "shop.handlers.totals0", "paused_keys": self.keys}]

    async def redrive(
        self, operator: Operator, id_: int, record: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Note it."""
        if id_ not in self.dead:
            raise Unknown(f"there is no dead letter {id_}")
        self.decided.append(("redrive", id_, record, operator.name))
        return self.dead.pop(id_) | {"status": "retrying", "newer": {"count": 2, "position": "0/0:0"}}

    async def discard(self, operator: Operator, id_: int) -> dict[str, Any]:
        """Note it."""
        self.decided.append(("discard", id_, operator.name))
        return self.dead.pop(id_)

    async def pause(
        self, operator: Operator, handler: str, lane_key: str | None = None, *, paused: bool
    ) -> dict[str, Any]:
        """Note it."""
        del operator
        if lane_key == "refused":
            raise Refused(f"that is no lane key {self.text}")
        self.decided.append(("pause" if paused else "resume", handler, lane_key))
        if lane_key is not None:
            self.keys = [lane_key] if paused else []
        return {"handler": handler, "paused": paused}

    async def backfill(
        self, operator: Operator, table: str, *, handler: str | None = None, rate: int | None = None
    ) -> list[dict[str, Any]]:
        """Note it."""
        del operator
        self.decided.append(("backfill", table, handler, rate))
        return [self.fill(len(self.fills) + 1, table, handler or "shop.handlers.totals0")]

    def fill(self, id_: int, table: str, handler: str, **more: Any) -> dict[str, Any]:
        """Make one."""
        schema, _, name = table.partition(".")
        known = {"id": id_, "handler": handler, "schema": schema, "table": name, "state": "running"}
        known |= {"gap": None, "condition": None, "rate": None, "rows": 250_000, "keys": 1_000}
        known |= {"estimated": 1_000_000, "asked_by": "anna", "asked_at": None, "done_at": None}
        self.fills[id_] = known | more
        return self.fills[id_]

    async def backfills(self, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """List them."""
        return [one for one in self.fills.values() if ids is None or one["id"] in ids]

    async def cancel_backfill(self, id_: int) -> dict[str, Any]:
        """Note it."""
        self.decided.append(("cancel", id_))
        self.fills[id_]["state"] = "cancelled"
        return self.fills[id_]

    async def resume_backfill(self, id_: int, rate: int | None = None) -> dict[str, Any]:
        """Note it."""
        self.decided.append(("go on", id_, rate))
        self.fills[id_]["state"] = "running"
        return self.fills[id_]


@asynccontextmanager
async def dashboard(
    told: Told, desk: Remembering | None = None, host: str = "127.0.0.1", **options: Any
) -> AsyncIterator[Served]:
    """Serve the page, and the desk behind it."""
    closing = asyncio.Event()
    bearer = Bearer(
        Tokens("https://abcdefgh.supabase.co", secret=SECRET), allow=lambda one: one.may_operate(None)
    )
    routes: list[BaseRoute] = page_routes(told.status, closing, **options)
    routes += desk_routes(bearer, lambda: desk)
    async with serve(health_app(told, routes), host, 0, closing=closing) as served:
        yield served
