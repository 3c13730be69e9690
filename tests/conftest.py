"""What every test may use: one Postgres and one Redis for the session, a project of its own for each test."""

from collections.abc import AsyncIterator

import pytest

from tests.stack import Servers, servers


@pytest.fixture(scope="session")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Servers]:
    """Servers that nobody kills."""
    async with servers(tmp_path_factory.mktemp("servers")) as running:
        yield running
