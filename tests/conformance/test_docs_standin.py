"""The example of standin/README.md, run."""

import asyncio
from typing import Any

import asyncpg
import pytest

from tests.pages import blocks

# The client reads what `websockets` has declared deprecated.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:ConnectionClosed\.(code|reason) is deprecated:DeprecationWarning"
)


async def test_the_example_loses_what_it_says(project: str) -> None:
    session = await asyncpg.connect(project)
    await session.execute(
        "create table public.orders (id int primary key);alter publication supabase_realtime add table orders"
    )
    await session.close()
    (block,) = blocks("python", page="standin/README.md")
    module: dict[str, Any] = {}
    exec(compile(block.text, block.page, "exec"), module)  # noqa: S102 - our own page
    # In a loop of its own, which ends the tasks that the client leaves behind.
    arrived = await asyncio.to_thread(lambda: asyncio.run(module["what_arrives"](project)))
    assert arrived == [6]
