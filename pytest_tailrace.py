"""The pytest plugin: fixtures for tests of handlers. See docs/testing.md.

pytest loads it at every start where Tailrace is installed, used or not. So it imports nothing but pytest, and
stands outside the package `worker`, which would bring SQLAlchemy along. The rest comes with a fixture.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

try:
    import pytest_asyncio
except ImportError:  # tests are run by another plugin, to which fixtures are pytest's own
    async_fixture: Callable[..., Any] = pytest.fixture
else:
    async_fixture = pytest_asyncio.fixture

if TYPE_CHECKING:
    from worker.testing import Database, Deliver, Pipeline, Stack
    from worker.testing.stack import Tables


@pytest.fixture(scope="session")
def tailrace_tables() -> "Tables | Sequence[Tables]":
    """The tables: SQL, a path to a file of it, SQLAlchemy metadata, or a list of such. Override it."""
    return []


@pytest.fixture(scope="session")
def tailrace_handlers() -> str:
    """The modules of the handlers, as in HANDLERS, which is also the default. Override it."""
    return os.environ.get("HANDLERS", "handlers")


@pytest.fixture(scope="session")
def tailrace_stack() -> "Iterator[Stack]":
    """An embedded Postgres and Redis, for all tests of the session: `database_url`, `redis_url`."""
    try:
        from worker.testing.stack import Stack
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"standin", "asyncpg"}:
            raise
        needed = "the fixtures of Tailrace need: pip install '../tailrace[standin]', which is your checkout"
        raise pytest.UsageError(needed) from error
    with Stack() as stack:
        yield stack


@pytest.fixture(scope="session")
def tailrace_database(
    tailrace_stack: "Stack", tailrace_tables: "Tables | Sequence[Tables]", tailrace_handlers: str
) -> "Database":
    """A database with the tests' tables and the handlers that go with it. Nothing is ever committed there."""
    return tailrace_stack.prepare(tailrace_tables, tailrace_handlers)


@async_fixture
async def deliver(tailrace_database: "Database") -> "AsyncIterator[Deliver]":
    """Write rows and call the handlers with the changes, in a transaction that is rolled back."""
    from worker.testing import Deliver

    async with Deliver(tailrace_database) as made:
        yield made


@async_fixture
async def pipeline(tailrace_stack: "Stack", tailrace_database: "Database") -> "AsyncIterator[Pipeline]":
    """A listener and a worker on a copy of the database."""
    from worker.testing import Pipeline

    async with Pipeline(tailrace_stack, tailrace_database) as made:
        yield made


@pytest.fixture
def settle(pipeline: "Pipeline") -> Callable[..., Awaitable[None]]:
    """Wait until all that was committed is applied."""
    return pipeline.settle
