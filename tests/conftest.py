"""What every test may use: one Postgres and one Redis for the session, a project of its own for each test."""

from collections.abc import AsyncIterator

import pytest

from tests import leaks
from tests.stack import Servers, servers


def pytest_configure(config: pytest.Config) -> None:
    # Not by `pytest_plugins`, which comes too late for a module that is imported already.
    config.pluginmanager.register(leaks)


SLOW = (
    "tests/awaits/",
    "tests/chaos/",
    "tests/e2e/",
    "tests/kit/",
    "tests/conformance/",
    "tests/integration/",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files of long tests first: all others would wait for the process that begins one of them last.
    items.sort(key=lambda item: next((n for n, way in enumerate(SLOW) if way in item.nodeid), len(SLOW)))


@pytest.fixture(scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Servers that nobody kills."""
    async with servers(tmp_path_factory.mktemp("servers")) as running:
        yield running
