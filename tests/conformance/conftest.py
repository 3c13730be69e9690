"""One embedded Postgres for the suite, and in it a fresh project for each test that asks."""

from collections.abc import AsyncIterator

import pytest

from standin.embedded import EmbeddedPostgres
from tests.conformance.servers import cluster, database


@pytest.fixture(scope="session")
async def postgres(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedPostgres]:
    async with cluster(tmp_path_factory.mktemp("conformance")) as running:
        yield running


@pytest.fixture
async def project(postgres: EmbeddedPostgres) -> AsyncIterator[str]:
    async with database(postgres) as url:
        yield url
