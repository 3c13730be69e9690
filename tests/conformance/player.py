"""Plays a script against a running stand-in and notes what every connection received.

The player waits for signals: before each step for every frame that the script has promised so far, and at a
fence for a change of its own that is committed after all others. It never sleeps, except until a token
expires by the clock. It judges nothing; `comparison` does.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

import asyncpg
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from tests.conformance.client import FENCE, Client
from tests.conformance.frames import Frame, Labels, normalise
from tests.conformance.script import (
    CheckPublication,
    Close,
    Closed,
    Copy,
    Expire,
    Fence,
    Open,
    Receive,
    Refused,
    Script,
    Send,
    Sql,
    Step,
    Token,
)

_NAMED = re.compile(r"\{\{(\w+)\}\}")
# How long a promised frame may take; once one is late, the run has failed and the others get less time.
_PATIENCE, _LATE_PATIENCE = 10.0, 0.5
# A token that must expire while the script runs gets this long; whole seconds, as `exp` counts them.
_SHORT_LIFE = 3


@dataclass(frozen=True, slots=True)
class Server:
    """A running stand-in as the player needs it."""

    url: str
    database_url: str
    jwt_secret: str
    look_at_publication: Callable[[], None]


@dataclass(slots=True)
class Played:
    """What happened: frames in order of arrival, refused handshakes, close codes, statements gone wrong."""

    frames: list[tuple[str, Frame]] = field(default_factory=list)
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    closed: dict[str, int] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)


async def play(script: Script, server: Server) -> Played:
    """Play all steps and return what was seen. Statements and connections are closed in any case."""
    async with Player(script, server) as player:
        for step in script.steps:
            await player.do(step)
        await player.finish()
        return player.played()


def signed(claims: Mapping[str, object], secret: str) -> str:
    """Sign claims with HS256."""
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
    text = ".".join(map(_unpadded, parts))
    return f"{text}.{_unpadded(hmac.new(secret.encode(), text.encode(), hashlib.sha256).digest())}"


def _unpadded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Player:
    """Plays steps one by one; a context manager, which closes what is open.

    Attributes:
        margin: seconds to wait beyond the end of a token where no frame is promised that tells it.
    """

    margin = 0.0

    def __init__(self, script: Script, server: Server) -> None:
        self._script = script
        self._server = server
        self.log: list[tuple[str, str]] = []
        self._clients: dict[str, Client] = {}
        self._promised: dict[str, Counter[str]] = {}
        self._sessions: dict[str, asyncpg.Connection] = {}
        self._tokens: dict[str, str] = {}
        self._expires = 0.0
        self._fences = 0
        self._patience = _PATIENCE
        self.seen = Played()
        self._started = time.time()

    async def __aenter__(self) -> Self:
        await (await self._session("main")).execute(
            "create schema if not exists fence; create table if not exists fence.rows(id int primary key);"
            "alter publication supabase_realtime add table fence.rows;"
            "grant usage on schema fence to service_role; grant select on fence.rows to service_role"
        )
        self._fence_client = await self._join_fence()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in [*self._clients.values(), self._fence_client]:
            await client.close()
        for session in self._sessions.values():
            await session.close()

    async def do(self, step: Step) -> None:
        """Do one step, after everything promised before it has arrived."""
        match step:
            case Receive(conn, frame):
                self._promised.setdefault(conn, Counter())[frame.topic] += 1
            case Refused():
                pass
            case Open() | Send() | Close() | Closed():
                await self._settle()
                await self._do_as_client(step)
            case _:
                await self._settle()
                await self._do_around(step)

    async def _do_as_client(self, step: Open | Send | Close | Closed) -> None:
        match step:
            case Open(conn, path, headers):
                await self._open(conn, path, headers)
            case Send(conn, text):
                await self._clients[conn].socket.send(self._filled(text))
            case Close(conn):
                await self._close(conn)
            case Closed(conn, _):
                await self._clients[conn].wait(lambda: False, self._patience)

    async def _do_around(self, step: Step) -> None:
        match step:
            case Sql(text, session, fails):
                await self._run(text, session, fails=fails)
            case Copy(table, columns, rows):
                main = await self._session("main")
                await main.copy_records_to_table(table, records=rows, columns=columns)
            case Fence():
                await self.fence()
            case Expire():
                await asyncio.sleep(max(0.0, self._expires + self.margin - time.time()))
            case CheckPublication():
                self._server.look_at_publication()
                # The poll under way had looked before: the second fence is behind one that had not.
                await self.fence()
                await self.fence()

    async def finish(self) -> None:
        """Wait for what is promised, then for what was not: a last fence behind all changes."""
        await self._settle()
        await self.fence()
        for name in list(self._clients):
            await self._close(name)

    def played(self) -> Played:
        """What was seen, frames in comparable form."""
        ended = time.time()

        def is_now(text: str) -> bool:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                return False
            return moment.tzinfo is not None and self._started - 5 < moment.timestamp() < ended + 5

        labels = Labels(is_now=is_now)
        self.seen.frames = [(name, normalise(raw, labels)) for name, raw in self.log]
        return self.seen

    async def _settle(self) -> None:
        for name, counts in self._promised.items():
            client = self._clients.get(name)
            if client is None:
                continue
            if not await client.wait(client.has(counts), self._patience):
                self._patience = _LATE_PATIENCE

    async def _open(self, conn: str, path: str, headers: tuple[tuple[str, str], ...]) -> None:
        try:
            socket = await self._connect(
                self._filled(path), [(key, self._filled(value)) for key, value in headers]
            )
        except InvalidStatus as refusal:
            body = bytes(refusal.response.body or b"").decode()
            self.seen.refused[conn] = (refusal.response.status_code, body)
            return
        vsn = "2.0.0" if "vsn=2.0.0" in path else "1.0.0"
        self._clients[conn] = Client(conn, socket, self.log, vsn)

    async def _connect(self, path: str, headers: list[tuple[str, str]]) -> ClientConnection:
        return await connect(
            self._server.url + path,
            additional_headers=headers,
            max_size=None,
            ping_interval=None,
            max_queue=None,
        )

    async def _close(self, conn: str) -> None:
        client = self._clients.get(conn)
        if client is None:
            return
        if client.code is None:
            self._fences += 1
            await client.flush(f"{FENCE}{self._fences}", self._patience)
        if client.code is not None:
            self.seen.closed[conn] = client.code
        await client.close()
        del self._clients[conn]
        self._promised.pop(conn, None)

    async def fence(self) -> None:
        """Wait until every change committed before has been judged, sent and received."""
        if self._fence_client.code is not None:
            # Closed like any other client that is silent for too long.
            await self._fence_client.close()
            self._fence_client = await self._join_fence()
        self._fences += 1
        number, ref = str(self._fences), f"{FENCE}{self._fences}"
        await self._sessions["fence"].execute("insert into fence.rows values($1)", self._fences)
        assert await self._fence_client.wait(lambda: number in self._fence_client.rows, _PATIENCE), (
            "a committed change did not arrive: the feed stands still"
        )
        for client in self._clients.values():
            if client.code is None:
                await client.flush(ref, self._patience)

    async def _join_fence(self) -> Client:
        await self._session("fence")
        claims = {"role": "service_role", "exp": int(time.time()) + 3600}
        key = signed(claims, self._server.jwt_secret)
        socket = await self._connect(f"/socket/websocket?apikey={key}&vsn=1.0.0", [])
        client = Client(FENCE, socket, [], "1.0.0")
        binding = {"event": "INSERT", "schema": "fence", "table": "rows"}
        join = {"config": {"postgres_changes": [binding]}}
        await socket.send(
            json.dumps(
                {"topic": "realtime:fence", "event": "phx_join", "payload": join, "ref": "1", "join_ref": "1"}
            )
        )
        assert await client.wait(lambda: client.counts["realtime:fence"] >= 2, _PATIENCE), "no subscription"
        return client

    async def _session(self, name: str) -> asyncpg.Connection:
        if name not in self._sessions:
            self._sessions[name] = await asyncpg.connect(self._server.database_url)
        return self._sessions[name]

    async def _run(self, text: str, name: str, *, fails: bool) -> None:
        session = await self._session(name)
        try:
            await session.execute(text)
        except asyncpg.PostgresError as refusal:
            if not fails:
                self.seen.failures.append((text, str(refusal)))
        else:
            if fails:
                self.seen.failures.append((text, "was not refused"))

    def _filled(self, text: str) -> str:
        return _NAMED.sub(lambda found: self._token(found.group(1)), text)

    def _token(self, name: str) -> str:
        if name not in self._tokens:
            self._tokens[name] = self._sign(self._script.tokens[name])
        return self._tokens[name]

    def _sign(self, token: Token) -> str:
        claims = dict(token.claims)
        now = int(time.time())
        claims["iat"] = now - 60
        if token.lifetime is not None:
            short = 0 < token.lifetime <= 60
            claims["exp"] = now + _SHORT_LIFE if short else now + int(token.lifetime)
            if short:
                self._expires = max(self._expires, claims["exp"])
        return signed(claims, self._server.jwt_secret if token.valid else f"not {self._server.jwt_secret}")
