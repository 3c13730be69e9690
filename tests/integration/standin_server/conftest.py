"""Fixtures: a websocket server whose changes the test commits by hand."""

from collections.abc import AsyncIterator

import pytest

from tests.integration.standin_server.driving import Running, Start, running


@pytest.fixture
def start() -> Start:
    return running


@pytest.fixture
async def server() -> AsyncIterator[Running]:
    async with running() as started:
        yield started
