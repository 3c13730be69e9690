"""A log for each test, read by each of the transports."""

from collections.abc import AsyncIterator

import pytest

from tests.integration.wal.bench import ORDERS, Kind, Log, database
from tests.stack import Servers


@pytest.fixture
async def log(shared: Servers) -> AsyncIterator[Log]:
    async with database(shared, ORDERS) as made:
        yield made


@pytest.fixture(params=["stream", "windows"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param  # type: ignore[no-any-return] # one of the two above
