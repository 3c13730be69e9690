"""`python -m standin`: the stand-in alone, on an embedded Postgres or on one that is given.

It prints one line of JSON when it is ready, and ends cleanly on SIGINT and SIGTERM.
Exit codes: 0 ended as asked, 1 broke while it ran, 2 could not start.
"""

import argparse
import asyncio
import contextlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import orjson
import structlog

from standin import LOCAL_JWT_SECRET, Behaviour, Standin, StandinError
from standin.embedded import EmbeddedPostgres, EmbeddedRedis, bootstrap_supabase
from standin.server.service import POLL_INTERVAL


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m standin", description="A local Supabase Realtime, for tests and experiments."
    )
    made.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    made.add_argument("--port", type=_port, default=0, help="port to listen on (default: a free one)")
    made.add_argument("--database-url", help="a Postgres with wal_level=logical (default: an embedded one)")
    made.add_argument("--redis", action="store_true", help="start an embedded Redis, too")
    made.add_argument("--jwt-secret", default=LOCAL_JWT_SECRET, help="secret of the keys, at least 32 bytes")
    made.add_argument("--data", type=Path, help="directory of the embedded servers (default: temporary)")
    made.add_argument(
        "--poll-interval",
        type=_seconds,
        default=POLL_INTERVAL,
        help="seconds between looks at the slot (default: %(default)s; the real server: 0.1)",
    )
    made.add_argument("--seed", type=int, help="makes random faults repeatable")
    made.add_argument(
        "--real",
        action="store_true",
        help="delays and limits of the real server instead of short ones and none",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until a signal comes; the process's exit code."""
    # Standard output is for the one line that scripts read.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    options = parser().parse_args(arguments)
    try:
        return asyncio.run(_run(options))
    except StandinError as error:
        sys.stderr.write(f"standin: {error}\n")
        return 2


async def _run(options: argparse.Namespace) -> int:
    asked_to_end = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked_to_end.set)
    serving = asyncio.create_task(_serve(options, asked_to_end), name="standin")
    ending = asyncio.create_task(asked_to_end.wait(), name="standin signals")
    await asyncio.wait({serving, ending}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():
        serving.cancel()
    ending.cancel()
    try:
        await serving
    except asyncio.CancelledError:
        return 0
    return 1


async def _serve(options: argparse.Namespace, asked_to_end: asyncio.Event) -> None:
    async with contextlib.AsyncExitStack() as stack:
        database_url, redis_url = options.database_url, None
        try:
            if options.redis or database_url is None:
                data = options.data or Path(
                    stack.enter_context(tempfile.TemporaryDirectory(prefix="standin-"))
                )
            if database_url is None:
                database_url = await _embedded_postgres(stack, data)
            if options.redis:
                redis = EmbeddedRedis(data / "redis")
                await _start(stack, redis)
                redis_url = redis.url
        except (OSError, RuntimeError, asyncpg.PostgresError) as error:
            raise StandinError(f"an embedded server does not start: {error}") from error
        standin = await stack.enter_async_context(
            Standin(
                database_url,
                jwt_secret=options.jwt_secret,
                host=options.host,
                port=options.port,
                poll_interval=options.poll_interval,
                seed=options.seed,
                behaviour=Behaviour.real() if options.real else Behaviour(),
            )
        )
        if not asked_to_end.is_set():
            _say_ready(standin, database_url, redis_url, options.jwt_secret)
        await standin.failure()


async def _embedded_postgres(stack: contextlib.AsyncExitStack, data: Path) -> str:
    postgres = EmbeddedPostgres(data / "postgres")
    await _start(stack, postgres)
    await bootstrap_supabase(postgres.dsn())
    return postgres.dsn()


def _temporary(stack: contextlib.AsyncExitStack) -> Path:
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="standin-")))


async def _start(stack: contextlib.AsyncExitStack, server: EmbeddedPostgres | EmbeddedRedis) -> None:
    # A start that is broken off half-way would go on copying files while their directory is removed.
    stack.push_async_callback(server.stop)
    starting = asyncio.create_task(server.start(), name="standin embedded server")
    try:
        await asyncio.shield(starting)
    finally:
        await asyncio.wait({starting})


def _say_ready(standin: Standin, database_url: str, redis_url: str | None, jwt_secret: str) -> None:
    line = {
        "supabase_url": standin.supabase_url,
        "realtime_url": standin.realtime_url,
        "database_url": database_url,
        "redis_url": redis_url,
        "service_role_key": standin.service_role_key,
        "anon_key": standin.anon_key,
        "jwt_secret": jwt_secret,
        "admin_url": standin.admin_url,
    }
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()


def _port(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= int(text) <= 65535:  # noqa: PLR2004 (the range of TCP ports)
            return int(text)
    raise argparse.ArgumentTypeError(f"a port is a number from 0 to 65535, not {text!r}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"seconds are a number above 0, not {text!r}")


if __name__ == "__main__":
    raise SystemExit(main())
