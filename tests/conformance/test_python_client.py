"""The Python client, `realtime` and `supabase`, against the stand-in: all as it was against the real server.

The recordings 12_pyclient_* hold what the client was seen to do, its defects included; the same states must
follow from the same treatment here. They are compared with the recordings where those are at hand.
12_pyclient_frozen_server is not repeated: its 40 s are the client's own keepalive. Outages are shortened by a
shorter back-off.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import asyncpg
import pytest
from realtime import AsyncRealtimeChannel, AsyncRealtimeClient, RealtimePostgresChangesListenEvent
from supabase import AsyncClient, acreate_client

from standin import Standin
from tests.conformance import recordings

# The client reads what `websockets` has declared deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:ConnectionClosed\.(code|reason) is deprecated:DeprecationWarning"
)

PATIENCE = 15.0
# What the subscribe callback was told, by recording; the bad filter is the third client of its recording.
STATES = {
    "12_pyclient_basic": ["SUBSCRIBED", "CLOSED"],
    "12_pyclient_callback_exception": ["SUBSCRIBED"],
    "12_pyclient_frame_over_1MiB": ["SUBSCRIBED", "CHANNEL_ERROR", "SUBSCRIBED"],
    "12_pyclient_server_down_45s": ["SUBSCRIBED", "CHANNEL_ERROR"],
    "12_pyclient_error_frames": [
        "SUBSCRIBED",
        "SUBSCRIBED",
        "SUBSCRIBED",
        "CHANNEL_ERROR",
        "SUBSCRIBED",
        "CLOSED",
    ],
    "12_pyclient_token_expiry": ["SUBSCRIBED", "CHANNEL_ERROR", "CLOSED", "SUBSCRIBED"],
}

Callback = Callable[[Any], None]


class Watched:
    """A client, one channel of it, and all it was told."""

    def __init__(self, client: AsyncRealtimeClient, channel: AsyncRealtimeChannel) -> None:
        self.client = client
        self.channel = channel
        self.states: list[str] = []
        self.payloads: list[dict[str, Any]] = []
        self.acknowledged = 0
        self.news = asyncio.Condition()
        self.told: list[asyncio.Task[None]] = []

    def state(self, state: Any, _error: object) -> None:
        self.states.append(state.value)
        self._tell()

    def payload(self, payload: Any) -> None:
        self.payloads.append(payload["data"])
        self._tell()

    def system(self, _payload: object) -> None:
        self.acknowledged += 1
        self._tell()

    def _tell(self) -> None:
        self.told.append(asyncio.create_task(self._notify()))

    async def _notify(self) -> None:
        async with self.news:
            self.news.notify_all()

    async def until(self, reached: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self.news:
            await self.news.wait_for(reached)

    async def has(self, payloads: int) -> None:
        await self.until(lambda: len(self.payloads) >= payloads)


@asynccontextmanager
async def watching(
    standin: Standin,
    table: str,
    *,
    token: str = "",
    callback: Callback | None = None,
    **options: Any,
) -> AsyncIterator[Watched]:
    """Subscribe with the Python client to one table, and end its tasks afterwards."""
    narrowed = {name: options.pop(name) for name in ("filter",) if name in options}
    client = AsyncRealtimeClient(standin.realtime_url, token or standin.service_role_key, **options)
    watched = Watched(client, client.channel("watched"))
    watched.channel.on_postgres_changes(
        RealtimePostgresChangesListenEvent.All,
        callback=callback or watched.payload,
        schema="public",
        table=table,
        **narrowed,
    )
    watched.channel.on_system(watched.system)
    await client.connect()
    try:
        await watched.channel.subscribe(watched.state)
        yield watched
    finally:
        tasks = [task for task in (client._listen_task, client._heartbeat_task) if task]
        await client.close()
        watched.channel.rejoin_timer.reset()
        await asyncio.gather(*tasks, *watched.told, return_exceptions=True)


@pytest.fixture
async def writer(project: str) -> AsyncIterator[asyncpg.Connection]:
    session = await asyncpg.connect(project)
    await session.execute(
        "create table public.rows"
        "(id int primary key, v text, big bigint, exact numeric, approx double precision);"
        "create table public.keyless(v text);"
        "create table public.wide(id int primary key, v text, body text);"
        "alter table wide replica identity full; alter table wide alter body set storage external;"
        "alter publication supabase_realtime add table rows, keyless, wide"
    )
    yield session
    await session.close()


@pytest.fixture
async def standin(project: str, writer: asyncpg.Connection) -> AsyncIterator[Standin]:
    assert not writer.is_closed()
    async with Standin(project) as running:
        yield running


@pytest.mark.skipif(recordings.directory() is None, reason="the recordings are not at hand")
@pytest.mark.parametrize("name", STATES)
def test_the_client_was_told_the_same_by_the_real_server(name: str) -> None:
    told = re.compile(r"subscribe callback: RealtimeSubscribeStates\.(\w+)")
    notes = [entry.raw for entry in recordings.read(name) if entry.dir == "note"]
    assert [found.group(1) for note in notes if (found := told.match(note))] == STATES[name]


async def test_basics(standin: Standin, writer: asyncpg.Connection) -> None:
    async with watching(standin, "rows") as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        await writer.execute("insert into rows(id, v) values(1, 'one')")
        await writer.execute("update rows set v = 'uno'")
        await writer.execute("delete from rows")
        await watched.has(3)
        assert [payload["type"].value for payload in watched.payloads] == ["INSERT", "UPDATE", "DELETE"]
        assert watched.payloads[0]["record"]["v"] == "one"
        assert watched.payloads[2]["old_record"] == {"id": 1}
        await watched.channel.unsubscribe()
        await watched.until(lambda: len(watched.states) == 2)
        async with watching(standin, "rows") as other:
            await other.until(lambda: other.acknowledged == 1)
            await writer.execute("insert into rows(id, v) values(2, 'two')")
            await other.has(1)
        assert watched.states == STATES["12_pyclient_basic"]
        assert len(watched.payloads) == 3


async def test_values_as_the_client_parses_them(standin: Standin, writer: asyncpg.Connection) -> None:
    async with watching(standin, "rows") as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        await writer.execute(
            "insert into rows values"
            "(1, '🦊', 9007199254740993, 1234567890123456789012345678.0123456789, 1e308)"
        )
        await watched.has(1)
        record = watched.payloads[0]["record"]
        assert record == {
            "id": 1,
            "v": "🦊",
            "big": 9007199254740993,
            "exact": 1.2345678901234569e27,
            "approx": 10**308,
        }
        assert isinstance(record["exact"], float), "the client loses the digits of a numeric"


async def test_error_frames(
    standin: Standin, writer: asyncpg.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "realtime")
    async with watching(standin, "keyless") as watched, watching(standin, "wide") as fence:
        await watched.until(lambda: watched.acknowledged == 1)
        await fence.until(lambda: fence.acknowledged == 1)
        await writer.execute("insert into keyless values('x')")
        await writer.execute("insert into wide values(1, 'small', repeat('x', 1200000))")
        await fence.has(1)
        assert fence.payloads[0]["errors"] == ["Error 413: Payload Too Large"]
        # The answer to the leave comes behind the frame, on the same socket.
        await watched.channel.unsubscribe()
        await watched.until(lambda: watched.states[-1] == "CLOSED")
        assert watched.payloads == []
    assert "Unrecognized message format" in caplog.text
    assert "Error 400: Bad Request, no primary key" in caplog.text


async def test_a_bad_filter_ends_in_a_forgotten_channel(standin: Standin) -> None:
    async with watching(standin, "rows", filter="nothing=eq.1") as watched:
        await watched.until(lambda: len(watched.states) == 4)
        assert watched.states == STATES["12_pyclient_error_frames"][2:]
        assert watched.client.channels == {}
        assert watched.client.is_connected


async def test_an_exception_in_a_callback_ends_the_reading_in_silence(
    standin: Standin, writer: asyncpg.Connection
) -> None:
    seen = []

    def callback(payload: Any) -> None:
        seen.append(payload["data"]["record"]["v"])
        if seen[-1] == "boom":
            raise RuntimeError("callback failed")

    async with watching(standin, "rows", callback=callback) as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        reader = watched.client._listen_task
        assert reader is not None
        await writer.execute("insert into rows(id, v) values(1, 'a'), (2, 'boom'), (3, 'unseen')")
        with pytest.raises(RuntimeError, match="callback failed"):
            await asyncio.wait_for(asyncio.shield(reader), PATIENCE)
        assert seen == ["a", "boom"]
        assert watched.client.is_connected
        assert watched.channel.is_joined
        assert watched.states == STATES["12_pyclient_callback_exception"]


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_an_async_callback_is_never_awaited(standin: Standin, writer: asyncpg.Connection) -> None:
    awaited = []

    async def callback(payload: object) -> None:
        awaited.append(payload)

    async with (
        watching(standin, "rows", callback=cast(Callback, callback)) as watched,
        watching(standin, "rows") as other,
    ):
        await watched.until(lambda: watched.acknowledged == 1)
        await other.until(lambda: other.acknowledged == 1)
        await writer.execute("insert into rows(id) values(1)")
        await other.has(1)
        await watched.channel.unsubscribe()
        assert awaited == []


async def test_a_frame_over_one_mebibyte_closes_the_socket_and_is_lost(
    standin: Standin, writer: asyncpg.Connection
) -> None:
    async with watching(standin, "wide") as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        await writer.execute("insert into wide values(1, 'a', repeat('x', 600000))")
        await watched.has(1)
        await writer.execute("update wide set v = 'b'")
        await watched.until(lambda: watched.acknowledged == 2)
        await writer.execute("delete from wide")
        await watched.has(2)
        assert [payload["type"].value for payload in watched.payloads] == ["INSERT", "DELETE"]
        assert watched.states == STATES["12_pyclient_frame_over_1MiB"]


async def test_an_expired_token_closes_the_channel_for_good(standin: Standin) -> None:
    token = standin.sign({"role": "anon"}, expires_in=2)
    async with watching(standin, "rows", token=token) as watched:
        await watched.until(lambda: len(watched.states) == 3)
        assert watched.states == STATES["12_pyclient_token_expiry"][:3]
        assert watched.client.is_connected
        assert watched.client.channels == {}


async def test_set_auth_in_time_keeps_the_channel(standin: Standin, writer: asyncpg.Connection) -> None:
    token = standin.sign({"role": "anon"}, expires_in=3)
    async with watching(standin, "rows", token=token) as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        await watched.client.set_auth(standin.sign({"role": "anon", "sub": "x"}))
        await watched.until(lambda: watched.acknowledged == 2)
        await writer.execute("insert into rows(id) values(1)")
        await watched.has(1)
        assert watched.states == ["SUBSCRIBED"]


async def test_the_client_comes_back_after_a_restart(standin: Standin, writer: asyncpg.Connection) -> None:
    async with watching(standin, "rows", initial_backoff=0.05) as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        await standin.drop_connections(1012)
        await watched.until(lambda: watched.acknowledged == 2)
        await writer.execute("insert into rows(id) values(1)")
        await watched.has(1)
        assert watched.states == ["SUBSCRIBED", "CHANNEL_ERROR", "SUBSCRIBED"]


async def test_after_five_attempts_the_client_gives_up_for_good(standin: Standin) -> None:
    async with watching(standin, "rows", initial_backoff=0.01) as watched:
        await watched.until(lambda: watched.acknowledged == 1)
        reader = watched.client._listen_task
        assert reader is not None
        standin.faults.refuse_connections = True
        await standin.drop_connections(1012)
        with pytest.raises(Exception, match=r"HTTP|connection|closed"):
            await asyncio.wait_for(asyncio.shield(reader), PATIENCE)
        standin.faults.refuse_connections = False
        assert watched.states == STATES["12_pyclient_server_down_45s"]
        assert not watched.client.is_connected
        assert watched.channel.is_errored


async def test_supabase_subscribes_by_the_project_url(standin: Standin, writer: asyncpg.Connection) -> None:
    client: AsyncClient = await acreate_client(standin.supabase_url, standin.service_role_key)
    channel = client.channel("rows")
    watched = Watched(client.realtime, channel)
    channel.on_postgres_changes(
        RealtimePostgresChangesListenEvent.Insert, callback=watched.payload, schema="public", table="rows"
    )
    channel.on_system(watched.system)
    try:
        await channel.subscribe(watched.state)
        await watched.until(lambda: watched.acknowledged == 1)
        await writer.execute("insert into rows(id, v) values(1, 'by project')")
        await watched.has(1)
        assert watched.payloads[0]["record"]["v"] == "by project"
    finally:
        tasks = [task for task in (client.realtime._listen_task, client.realtime._heartbeat_task) if task]
        await client.realtime.close()
        await asyncio.gather(*tasks, *watched.told, return_exceptions=True)
