"""Connections to Redis: what is lost while nobody looks, and what is too large for a buffer."""

import asyncio
import math
from collections.abc import AsyncIterator

import pytest
from arq.utils import timestamp_ms
from redis.asyncio import Redis
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import TimeoutError as RedisTimeoutError

from tests.stack import Servers
from worker.lanes import Lane
from worker.processes import announce
from worker.queue import PatientRedis, connection_pool


@pytest.fixture
async def redis(shared: Servers) -> AsyncIterator[Redis]:
    """A client that tries nothing twice."""
    client: Redis = Redis(connection_pool=connection_pool(shared.redis.url, retries=0))
    yield client
    await client.aclose(close_connection_pool=True)


async def test_a_connection_that_the_server_closed_is_made_anew_before_a_command(
    redis: Redis, shared: Servers
) -> None:
    mine = await redis.client_id()
    connection = await redis.connection_pool.get_connection()
    await redis.connection_pool.release(connection)
    async with Redis.from_url(shared.redis.url) as other:
        assert await other.client_kill_filter(_id=str(mine))
    reader = connection._reader
    assert reader is not None
    assert await reader.read() == b""
    assert await redis.client_id() != mine


async def test_a_command_larger_than_a_socket_takes_at_once_arrives_whole(redis: Redis) -> None:
    value = bytes(range(256)) * (1 << 16)
    await redis.set("test:large", value)
    assert await redis.getdel("test:large") == value


async def test_commands_of_one_connection_are_answered_in_their_order_also_after_one_was_cancelled(
    redis: Redis,
) -> None:
    waiting = asyncio.create_task(redis.blpop(["test:nothing"], timeout=0))
    while not any(one["cmd"].startswith("blpop") for one in await redis.client_list()):
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    answers = await asyncio.gather(*(redis.echo(f"{number}") for number in range(20)))
    assert answers == [f"{number}".encode() for number in range(20)]


async def test_a_server_that_does_not_answer_is_a_timeout() -> None:
    gone = asyncio.Event()

    async def silent(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        pool = connection_pool(f"redis://127.0.0.1:{port}?socket_timeout=0.05", retries=0)
        client: Redis = Redis(connection_pool=pool)
        with pytest.raises(RedisTimeoutError):
            await client.ping()
        await client.aclose(close_connection_pool=True)
        gone.set()


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("redis://localhost", Connection),
        ("rediss://localhost", SSLConnection),
        ("unix:///tmp/redis.sock", UnixDomainSocketConnection),
    ],
)
async def test_each_kind_of_url_has_its_kind_of_connection(url: str, kind: type) -> None:
    assert isinstance(connection_pool(url).make_connection(), kind)


async def test_a_poll_that_waits_finds_the_job_that_rings(shared: Servers) -> None:
    queue = "a-poll-that-waits"
    pool = PatientRedis(shared.redis.url, queue=queue)
    pool.rung = asyncio.Event()
    try:
        asked = timestamp_ms() - 1
        poll = asyncio.create_task(pool.zrangebyscore(queue, min=-math.inf, start=0, num=10, max=asked))
        await announce(pool, queue, Lane("one", 1))
        pool.rung.set()
        assert len(await poll) == 1
    finally:
        await pool.delete(queue)
        await pool.aclose(close_connection_pool=True)
