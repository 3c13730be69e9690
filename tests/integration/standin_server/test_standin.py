import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import pytest
from realtime import AsyncRealtimeClient
from realtime import RealtimePostgresChangesListenEvent as Events
from supabase import acreate_client

from standin import Standin, StandinError
from standin.embedded import EmbeddedPostgres, bootstrap_supabase

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
async def database_url(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        await bootstrap_supabase(postgres.dsn())
        connection = await asyncpg.connect(postgres.dsn())
        await connection.execute(
            "create table orders(id bigint primary key, amount numeric);"
            "alter publication supabase_realtime add table orders"
        )
        await connection.close()
        yield postgres.dsn()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.execute("truncate orders")
    await connection.close()


@pytest.fixture
async def standin(database_url: str) -> AsyncIterator[Standin]:
    async with Standin(database_url) as started:
        yield started


class Heard:
    """What a client's callbacks were called with, to be waited for."""

    def __init__(self) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    def __call__(self, item: object) -> None:
        self._items.put_nowait(item)

    async def next(self) -> Any:
        async with asyncio.timeout(10):
            return await self._items.get()


async def write(database: asyncpg.Connection) -> None:
    await database.execute("insert into orders values (1, 12.50)")
    await database.execute("update orders set amount = 13 where id = 1")
    await database.execute("delete from orders where id = 1")


async def test_the_python_client_hears_insert_update_and_delete(
    standin: Standin, database: asyncpg.Connection
) -> None:
    changes, acknowledged = Heard(), Heard()
    client = AsyncRealtimeClient(standin.realtime_url, standin.service_role_key)
    channel = client.channel("orders")
    channel.on_postgres_changes(Events.All, changes, table="orders", schema="public").on_system(acknowledged)
    await channel.subscribe()
    await acknowledged.next()
    await write(database)
    heard = [(await changes.next())["data"] for _ in range(3)]
    assert [data["type"].value for data in heard] == ["INSERT", "UPDATE", "DELETE"]
    assert heard[0]["record"] == {"id": 1, "amount": 12.5}
    assert heard[2]["old_record"] == {"id": 1}
    await channel.unsubscribe()
    await standin.counters.reach("leaves", 1)
    await client.close()


async def test_the_supabase_client_subscribes_with_a_secret_key(
    standin: Standin, database: asyncpg.Connection
) -> None:
    changes, acknowledged = Heard(), Heard()
    client = await acreate_client(standin.supabase_url, "sb_secret_anything")
    channel = client.channel("orders")
    channel.on_postgres_changes(Events.Insert, changes, table="orders", schema="public").on_system(
        acknowledged
    )
    await channel.subscribe()
    await acknowledged.next()
    await write(database)
    assert (await changes.next())["data"]["record"]["id"] == 1
    await client.remove_all_channels()
    await client.realtime.close()


async def test_a_broken_connection_is_closed_with_the_code_that_was_asked_for(standin: Standin) -> None:
    client = AsyncRealtimeClient(standin.realtime_url, standin.anon_key, auto_reconnect=False)
    await client.connect()
    await standin.counters.reach("connections", 1)
    await standin.drop_connections(1012)
    await standin.counters.sink("connections", 0)
    await client.close()


async def test_nothing_is_left_running(database_url: str) -> None:
    before = asyncio.all_tasks()
    async with Standin(database_url) as standin:
        assert standin.admin_url
        await asyncio.sleep(0)
    assert asyncio.all_tasks() <= before


async def test_a_taken_port_is_told(database_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StandinError, match=f"cannot listen on 127.0.0.1:{port}: .*--port"):
            await Standin(database_url, port=port).start()


async def test_a_database_that_is_away_is_told_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StandinError) as caught:
        await Standin(f"postgresql://user:hidden@127.0.0.1:{port}/postgres").start()
    assert f"127.0.0.1:{port}/postgres" in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_database_without_the_publication_is_told(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute("create database bare")
    await connection.close()
    with pytest.raises(StandinError, match="no publication supabase_realtime: create publication"):
        await Standin(database_url.removesuffix("postgres") + "bare").start()


def test_a_short_secret_is_refused() -> None:
    with pytest.raises(StandinError, match="at least 32 bytes"):
        Standin("postgresql://127.0.0.1/postgres", jwt_secret="short")


@contextlib.asynccontextmanager
async def command(*arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "standin",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "error::ResourceWarning"},
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


async def ready(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        line: dict[str, Any] = orjson.loads(await process.stdout.readline())
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_command_says_one_line_and_ends_on_a_signal(
    database_url: str, number: signal.Signals
) -> None:
    async with command("--database-url", database_url) as process:
        line = await ready(process)
        assert line["database_url"] == database_url
        assert line["redis_url"] is None
        process.send_signal(number)
        async with asyncio.timeout(20):
            rest, errors = await process.communicate()
    assert (process.returncode, rest, errors) == (0, b"", b"")


async def test_the_command_alone_brings_its_own_servers(tmp_path: Path) -> None:
    async with command("--redis", "--data", str(tmp_path)) as process:
        line = await ready(process)
        assert set(line) == {
            "supabase_url",
            "realtime_url",
            "database_url",
            "redis_url",
            "service_role_key",
            "anon_key",
            "jwt_secret",
            "admin_url",
        }
        assert line["redis_url"]
        connection = await asyncpg.connect(line["database_url"])
        roles = await connection.fetch("select 1 from pg_roles where rolname in ('anon', 'service_role')")
        assert len(roles) == 2
        await connection.close()
        process.terminate()
        async with asyncio.timeout(30):
            assert await process.wait() == 0


async def test_the_command_ends_cleanly_while_it_is_still_starting(tmp_path: Path) -> None:
    async with command("--data", str(tmp_path)) as process, asyncio.timeout(60):
        while not (tmp_path / "postgres").exists():
            await asyncio.sleep(0.005)
        process.terminate()
        output, errors = await process.communicate()
    assert (process.returncode, output, errors) == (0, b"", b"")


async def test_the_command_that_cannot_start_says_why_and_exits_with_2() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with command("--database-url", f"postgresql://127.0.0.1:{port}/postgres") as process:
        async with asyncio.timeout(30):
            _out, errors = await process.communicate()
    assert process.returncode == 2
    assert errors.startswith(b"standin: cannot use the database at 127.0.0.1:")
    assert errors.count(b"\n") == 1
