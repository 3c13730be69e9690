"""A bench for each test."""

from collections.abc import AsyncIterator

import pytest

from tests.integration.mechanism.bench import Bench, bench
from tests.stack import Servers


@pytest.fixture
async def at(shared: Servers) -> AsyncIterator[Bench]:
    async with bench(shared) as made:
        yield made
