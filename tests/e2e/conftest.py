"""A shop for each test."""

from collections.abc import AsyncIterator

import pytest

from tests.e2e import shop as handlers
from tests.stack import Project, Servers, project, servers


@pytest.fixture
async def shop(shared: Servers) -> AsyncIterator[Project]:
    """A shop on servers that nobody kills."""
    async with project(shared, handlers.TABLES, "tests.e2e.shop") as made:
        yield made


@pytest.fixture
async def breakable(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Project]:
    """A shop on servers of its own."""
    async with (
        servers(tmp_path_factory.mktemp("breakable")) as own,
        project(own, handlers.TABLES, "tests.e2e.shop") as made,
    ):
        yield made
