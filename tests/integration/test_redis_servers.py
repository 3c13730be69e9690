"""Redis as it is run for real: behind TLS with a CA of its own, and as a group that sentinels watch."""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.asyncio import Redis
from redis.asyncio.connection import SSLConnection
from redis.asyncio.sentinel import SentinelConnectionPool, SentinelManagedConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from config.addresses import redis_address, secret_parts, sentinels
from standin.embedded import EmbeddedRedis, binaries
from standin.embedded.process import ServerProcess, free_port
from tests.e2e import shop as handlers
from tests.e2e.shop import DIFFERENCES
from tests.e2e.writing import Writer, logged
from tests.stack import Project, Servers, _pump, project
from worker.change import Position
from worker.check.redis import examine_redis
from worker.lanes import Entry, Found, Lane, Lanes
from worker.queue import arq_settings, connection_pool

# TLS


def name(words: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, words)])


@dataclass
class Certificates:
    ca: Path
    server: Path
    key: Path


def certificates(folder: Path, host: str) -> Certificates:
    """Make a CA and a certificate of it for one address."""
    begin = dt.datetime.now(dt.UTC) - dt.timedelta(hours=1)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    ca_name, server_name = name("CA of a test"), name("Redis of a test")
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    for key, subject, path, is_ca in (
        (keys[0], ca_name, made.ca, True),
        (keys[1], server_name, made.server, False),
    ):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if not is_ca:
            addresses = [x509.IPAddress(ipaddress.ip_address(host))]
            builder = builder.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        path.write_bytes(builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    made.key.write_bytes(
        keys[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    )
    return made


@asynccontextmanager
async def behind_tls(redis: EmbeddedRedis, made: Certificates) -> AsyncIterator[str]:
    """Give the URL of a Redis that is reached by TLS alone; the embedded server itself has none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server, made.key)
    ways: set[asyncio.Task[None]] = set()

    async def through(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        ways.add(task)
        task.add_done_callback(ways.discard)
        far = await asyncio.open_connection("127.0.0.1", redis.port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, far[1]), name="test: to Redis")
                group.create_task(_pump(far[0], writer), name="test: from Redis")
        except* (OSError, EOFError):
            pass
        finally:
            far[1].transport.abort()
            writer.transport.abort()

    server = await asyncio.start_server(through, "127.0.0.1", 0, ssl=context)
    try:
        yield f"rediss://127.0.0.1:{server.sockets[0].getsockname()[1]}/0?ssl_ca_certs={made.ca}"
    finally:
        server.close()
        for way in list(ways):
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)


async def settled(shop: Project, writer: Writer) -> None:
    await shop.until("select count(*) from derived_log", writer.committed, 60)
    await shop.until(DIFFERENCES, 0, 60)
    assert await logged(shop.db) == writer.history


async def test_listener_and_worker_reach_redis_by_tls_with_a_ca_of_its_own(
    shared: Servers, tmp_path: Path
) -> None:
    made = certificates(tmp_path, "127.0.0.1")
    async with (
        behind_tls(shared.redis, made) as url,
        project(shared, handlers.TABLES, "tests.e2e.shop", REDIS_URL=url) as shop,
    ):
        await shop.listener()
        await shop.worker()
        writer = Writer(shop, seed=31)
        await writer.write(300)
        await settled(shop, writer)
        checked = await shop.start(
            sys.executable, "-m", "arq", "--check", "worker.jobs.WorkerSettings", name="c"
        )
        assert await checked.ended() == 0
        found = await examine_redis(shop.settings)
        assert [one for one in found if one.state == "problem"] == []


async def test_a_server_whose_certificate_is_for_another_host_is_not_trusted(
    shared: Servers, tmp_path: Path
) -> None:
    made = certificates(tmp_path, "127.0.0.2")
    async with behind_tls(shared.redis, made) as url:
        async with Redis.from_pool(connection_pool(url, retries=0)) as client:
            with pytest.raises(RedisConnectionError, match="certificate is not valid for"):
                await client.ping()
        async with Redis.from_pool(connection_pool(f"{url}&ssl_check_hostname=false", retries=0)) as careless:
            assert await careless.ping()


async def test_a_server_of_an_unknown_ca_is_not_trusted(shared: Servers, tmp_path: Path) -> None:
    async with (
        behind_tls(shared.redis, certificates(tmp_path, "127.0.0.1")) as url,
        Redis.from_pool(connection_pool(url.partition("?")[0], retries=0)) as client,
    ):
        with pytest.raises(RedisConnectionError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.ping()


# Sentinels


@dataclass
class Group:
    """A master, its replica, and three sentinels that watch them."""

    first: EmbeddedRedis
    second: EmbeddedRedis
    ports: list[int]

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"redis+sentinel://{hosts}/lanes/0"

    async def agrees_on(self, port: int) -> None:
        """Wait until the last sentinel names this server as the master, and knows the others."""
        async with Redis(port=self.ports[-1], decode_responses=True) as sentinel, asyncio.timeout(60):
            while True:
                state = (await sentinel.sentinel_masters())["lanes"]
                if (state["port"], state["num-slaves"], state["num-other-sentinels"]) == (port, 1, 2):
                    return
                await asyncio.sleep(0.05)  # sentinels send no signal to who is not subscribed


@asynccontextmanager
async def group(folder: Path) -> AsyncIterator[Group]:
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(EmbeddedRedis(folder / "first"))
        second = await stack.enter_async_context(EmbeddedRedis(folder / "second"))
        async with Redis(port=second.port) as replica:
            await replica.replicaof("127.0.0.1", str(first.port))
        made = Group(first, second, [])
        for number in range(3):
            port, home = free_port(), folder / f"sentinel{number}"
            home.mkdir()
            settings = home / "sentinel.conf"
            settings.write_text(
                f"port {port}\nbind 127.0.0.1\ndir {home}\n"
                f"sentinel monitor lanes 127.0.0.1 {first.port} 2\n"
                "sentinel down-after-milliseconds lanes 1000\nsentinel failover-timeout lanes 5000\n"
            )
            command = [str(binaries.redis_server()), str(settings), "--sentinel"]
            started = await ServerProcess.start(command, log=home / "log", stop_signal=signal.SIGTERM)
            stack.push_async_callback(started.end, signal.SIGTERM)
            made.ports.append(port)
        for port in made.ports:
            await answers(port)
        await made.agrees_on(first.port)
        yield made


async def answers(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                async with Redis(port=port) as sentinel:
                    await sentinel.ping()
            except RedisConnectionError:
                await asyncio.sleep(0.02)
            else:
                return


@pytest.mark.slow
async def test_a_master_that_dies_is_replaced_and_nothing_is_lost_or_doubled(
    shared: Servers, tmp_path: Path
) -> None:
    async with (
        group(tmp_path) as redis,
        project(
            shared, handlers.TABLES, "tests.e2e.shop", REDIS_URL=redis.url, WORKER_DELIVERY="proven"
        ) as shop,
    ):
        await (await shop.listener(wait=False)).said("listening")
        await shop.worker()
        writer = Writer(shop, seed=32)
        writing = asyncio.create_task(writer.write(800, pace=0.004), name="test: writer")
        await shop.until("select count(*) >= 200 from derived_log", value=True)
        await redis.first.kill()
        await writing
        await settled(shop, writer)
        async with Redis(port=redis.second.port) as promoted:
            assert (await promoted.info("replication"))["role"] == "master"
        assert await shop.db.fetchval("select count(*) from tailrace.gaps") == 0
        for process in shop.processes:
            assert process.process.returncode is None
        checked = await shop.start(
            sys.executable, "-m", "arq", "--check", "worker.jobs.WorkerSettings", name="c"
        )
        assert await checked.ended() == 0
        await drop_slot(shop)


@pytest.mark.slow
async def test_what_reads_lanes_finds_the_new_master_by_itself(tmp_path: Path) -> None:
    """It has a client of its own, with other answers, over the connections of the first one."""
    async with group(tmp_path) as redis, AsyncExitStack() as stack:
        pool = connection_pool(redis.url)
        assert isinstance(pool, SentinelConnectionPool)
        client = await stack.enter_async_context(Redis.from_pool(pool))
        for sentinel in pool.sentinel_manager.sentinels:  # which the pool does not close
            stack.push_async_callback(sentinel.aclose)
        lanes, lane, start = Lanes(client, "test"), Lane("log", 3), Position(0, 0)

        async def write(number: int) -> None:
            previous = f"{number - 1}-0"
            entry = Entry(previous, (3,), (b"key",), "wal", b"payload %d" % number, number, 0, 0.0)
            await client.xadd(lanes.key("one", lane), {"e": msgspec.msgpack.encode(entry)}, id=f"{number}-0")

        for number in range(1, 31):
            await write(number)
        assert await client.wait(1, 10_000) == 1  # the replica has them, too
        before = await lanes.read("one", lane, start, 100)
        assert [read.entry.count for read in before.reads] == list(range(1, 31))

        await redis.first.kill()
        found: Found | None = None
        async with asyncio.timeout(60):
            while found is None:
                # While there is no master it says so; it never answers with less than there is.
                with contextlib.suppress(RedisError):
                    found = await lanes.read("one", lane, start, 100)
        assert found == before
        await write(31)
        after = await lanes.read("one", lane, before.reads[-1].position, 100)
        assert [read.entry.payload for read in after.reads] == [b"payload 31"]
        async with Redis(port=redis.second.port) as promoted:
            assert await promoted.xlen(lanes.key("one", lane)) == 31


async def drop_slot(shop: Project) -> None:
    for process in shop.processes:
        await process.kill()
    slot = "from pg_replication_slots where slot_name = 'tailrace'"
    await shop.until(f"select count(*) {slot} and active", 0)
    await shop.db.execute(f"select pg_drop_replication_slot(slot_name) {slot}")


def test_the_urls_of_sentinels_are_read() -> None:
    found = sentinels(
        "rediss+sentinel://me:p%40ss@a,b:1,[::1]:2/lanes/3?sentinel_password=x&ssl_ca_certs=/ca"
    )
    assert found == (
        (("a", 26379), ("b", 1), ("::1", 2)),
        "lanes",
        "rediss://me:p%40ss@master/3?ssl_ca_certs=%2Fca",
        None,
        "x",
    )
    pool = connection_pool("rediss+sentinel://me:p%40ss@a,b:1/lanes/3?ssl_ca_certs=/ca")
    made = pool.make_connection()
    assert isinstance(made, SentinelManagedConnection)
    assert isinstance(made, SSLConnection)
    assert (made.db, made.username, made.password) == (3, "me", "p@ss")
    check = arq_settings("redis+sentinel://a,b:1/lanes/3")
    assert (check.host, check.sentinel_master, check.database) == ([("a", 26379), ("b", 1)], "lanes", 3)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis+sentinel://a,b", "names no service"),
        ("redis+sentinel://a,b/lanes/first", "number of a database"),
        ("redis+sentinel://a:x,b/lanes", "check the port"),
        ("redis+sentinel:///lanes", "names no host"),
    ],
    ids=["no service", "no number", "no port", "no host"],
)
def test_what_is_wrong_with_the_url_of_sentinels_is_said(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        redis_address(url)


def test_passwords_of_sentinels_are_secret() -> None:
    url = "redis+sentinel://:m%40ster@a:1,b:2/lanes?sentinel_password=watch"
    assert set(secret_parts(url)) == {"m%40ster", "m@ster", "watch"}
