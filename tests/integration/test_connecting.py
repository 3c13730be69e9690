"""What a database URL says of TLS and the like, as a server sees it; and what is said where none is had."""

import asyncio
import datetime as dt
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import asyncpg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.integration.wal.pooler import pooled
from tests.stack import Servers, project
from worker.database import explain, make_engine
from worker.errors import ConfigurationError
from worker.pooling import Pooling, pooling_of

PASSWORD = "hunter2"


class Files(NamedTuple):
    certificate: Path
    key: Path


def certificate(folder: Path, host: str) -> Files:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = Files(folder / f"{host}.crt", folder / f"{host}.key")
    files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    pem, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, pem, plain))
    return files


Told = list[dict[str, str]]


@asynccontextmanager
async def refusing(state: str, message: str, tls: Files | None = None) -> AsyncIterator[tuple[int, Told]]:
    """A server that speaks Postgres so far as to refuse everybody; gives its port and what it was told."""
    told: Told = []
    context = None
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            start = await reader.readexactly(8)
            if start[4:] == struct.pack("!i", 80877103):
                writer.write(b"N" if context is None else b"S")
                await writer.drain()
                if context is not None:
                    await writer.start_tls(context)
                start = await reader.readexactly(8)
            rest = await reader.readexactly(struct.unpack("!i", start[:4])[0] - 8)
            words = rest.decode().split("\0")
            told.append(dict(zip(words[::2], words[1::2], strict=False)))
            fields = f"SFATAL\0VFATAL\0C{state}\0M{message}\0\0".encode()
            writer.write(b"E" + struct.pack("!i", len(fields) + 4) + fields)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], told


async def failure(url: str) -> str:
    engine = make_engine(url, name="tailrace test", size=1)
    try:
        async with engine.connect():
            said = "connected"
    except Exception as error:  # noqa: BLE001 - whatever it is, it is explained
        said = explain(error)
    finally:
        await engine.dispose()
    assert PASSWORD not in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("state", "message", "said"),
    [
        ("28P01", "password authentication failed", "refuses the user or password"),
        ("XX000", "Tenant or user not found", "the pooler knows no such project"),
        ("XX000", "(ENOTFOUND) tenant/user postgres.abc not found", "the pooler knows no such project"),
        ("XX000", "MaxClientsInSessionMode: max clients reached", "gives no more connections"),
        ("53300", "sorry, too many clients already", "gives no more connections"),
        ("3D000", "database does not exist", "the database named in DATABASE_URL does not exist"),
    ],
)
async def test_a_refusal_is_explained(state: str, message: str, said: str) -> None:
    async with refusing(state, message) as (port, _):
        assert said in await failure(f"postgresql://u:{PASSWORD}@127.0.0.1:{port}/x?sslmode=disable")


async def test_commands_tell_of_a_wrong_password_in_one_line(shared: Servers) -> None:
    async with project(shared, "create table orders (id bigint primary key)", "handlers") as made:
        url = shared.postgres.dsn(password=PASSWORD)
        for command in ("migrate", "models", "run"):
            code, output = await made.run(command, DATABASE_URL=url)
            assert code == 2
            (line,) = output.splitlines()
            assert "Postgres refuses the user or password of DATABASE_URL" in line


async def test_tls_is_verified_as_the_url_demands(tmp_path: Path) -> None:
    here, elsewhere = certificate(tmp_path, "localhost"), certificate(tmp_path, "db.example.com")
    done = "refuses the user or password"
    wrong = "the certificate of Postgres is not by sslrootcert"
    for tls, query, said in (
        (here, f"sslmode=verify-full&sslrootcert={here.certificate}", done),
        (here, f"sslmode=verify-full&sslrootcert={elsewhere.certificate}", wrong),
        (elsewhere, f"sslmode=verify-full&sslrootcert={elsewhere.certificate}", wrong),
        (elsewhere, f"sslmode=verify-ca&sslrootcert={elsewhere.certificate}", done),
        (elsewhere, f"sslmode=require&sslrootcert={here.certificate}", wrong),
        (elsewhere, "sslmode=require", done),
        (here, "sslmode=verify-full&sslrootcert=system", wrong),
        (None, "sslmode=require", "offers no TLS"),
        (None, "sslmode=prefer", done),
    ):
        async with refusing("28P01", "no", tls) as (port, _):
            assert said in await failure(f"postgresql://u:{PASSWORD}@localhost:{port}/x?{query}"), query


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("sslmode=verify-full&sslrootcert=/nonexistent.crt", "sslrootcert of DATABASE_URL cannot be read"),
        ("sslmode=verify-full&sslcert=/nonexistent.crt", "sslcert or sslkey of DATABASE_URL cannot be read"),
        ("sslmode=yes", "sslmode of DATABASE_URL is none of"),
    ],
)
def test_a_url_that_makes_no_sense_is_said_before_anything_is_connected(query: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make_engine(f"postgresql://u:{PASSWORD}@127.0.0.1:1/x?{query}", name="test")


async def test_parameters_of_other_clients_do_no_harm() -> None:
    query = "options=-c%20search_path%3Dshop&connect_timeout=3&keepalives_idle=5&application_name=x"
    query += "&channel_binding=prefer"
    async with refusing("28P01", "no") as (port, told):
        await failure(f"postgresql://u:{PASSWORD}@127.0.0.1:{port}/x?sslmode=disable&{query}")
    assert (told[0]["search_path"], told[0]["application_name"]) == ("shop", "tailrace test")


async def test_a_host_that_nobody_knows_is_explained() -> None:
    said = await failure(f"postgresql://u:{PASSWORD}@db.abcdefghijkl.supabase.invalid:5432/x")
    assert "the host of DATABASE_URL is not known here" in said


@pytest.mark.parametrize(
    "make", [lambda: OSError(101, "Network is unreachable"), lambda: OSError(97, "family")]
)
def test_an_address_of_another_family_is_explained(make: Callable[[], OSError]) -> None:
    assert "take the session pooler's" in explain(make())


async def test_a_pool_that_is_used_up_is_explained_and_connections_are_kept_alive(shared: Servers) -> None:
    engine = make_engine(shared.postgres.dsn(), name="test", size=1)
    engine.sync_engine.pool._timeout = 0.01  # type: ignore[attr-defined] # half a minute by default
    async with engine.connect() as connection:
        driver = (await connection.get_raw_connection()).driver_connection
        assert driver is not None
        opened = driver._transport.get_extra_info("socket")
        if opened.family in (socket.AF_INET, socket.AF_INET6):
            assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        with pytest.raises(Exception, match="QueuePool") as used_up:
            async with engine.connect():
                pass
    await engine.dispose()
    assert (
        explain(used_up.value) == "all connections of this process are in use, and none became free in time"
    )


async def test_a_direct_connection_compiles_nothing_unless_its_url_wants_it(shared: Servers) -> None:
    for query, jit in (("", "off"), ("?options=-c%20jit%3Don", "on")):
        engine = make_engine(shared.postgres.dsn() + query, name="test")
        async with engine.connect() as connection:
            assert (await connection.execute(text("show jit"))).scalar_one() == jit
        await engine.dispose()


async def test_a_connection_that_died_at_rest_is_replaced(
    shared: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.database.PING_AFTER_SECONDS", 0.0)
    own = text("select pg_backend_pid()")
    engine, other = (make_engine(shared.postgres.dsn(), name="test") for _ in range(2))
    async with engine.connect() as connection:
        before = (await connection.execute(own)).scalar_one()
    async with other.connect() as connection:
        await connection.execute(text("select pg_terminate_backend(:pid, 10000)"), {"pid": before})
    async with engine.connect() as connection:
        assert (await connection.execute(own)).scalar_one() != before
    await engine.dispose()
    await other.dispose()


@pytest.mark.parametrize("mode", ["session", "transaction"])
async def test_a_pooler_is_found_out_at_any_port(shared: Servers, mode: str) -> None:
    if shutil.which("pgbouncer") is None:
        pytest.skip("pgbouncer is not installed")
    async with pooled(shared.postgres.dsn(), mode=mode, size=2) as url:
        assert await pooling_of(lambda: asyncpg.connect(url, statement_cache_size=0)) is Pooling(
            f"{mode} pooler"
        )
        engine = make_engine(url, name="test")
        try:
            async with asyncio.TaskGroup() as group:
                # With statements that have names, some of these would not be known where they are run.
                for _ in range(2):
                    group.create_task(_ask_often(engine))
        finally:
            await engine.dispose()


async def _ask_often(engine: AsyncEngine) -> None:
    for n in range(50):
        async with engine.connect() as connection:
            asked = await connection.execute(text("select cast(:n as integer)"), {"n": n})
            assert asked.scalar_one() == n
