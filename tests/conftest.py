"""What every test may use: one Postgres and one Redis for the session, a project of its own for each test."""

from collections.abc import AsyncIterator

import pytest

from tests import leaks
from tests.stack import Servers, servers


def pytest_configure(config: pytest.Config) -> None:
    # Not by `pytest_plugins`, which comes too late for a module that is imported already.
    config.pluginmanager.register(leaks)


@pytest.fixture(scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Servers that nobody kills."""
    async with servers(tmp_path_factory.mktemp("servers")) as running:
        yield running
