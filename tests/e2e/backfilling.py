"""How the tests of backfills ask for one: by the command, as a person does."""

import json
from typing import Any

from tests.stack import Project


async def backfill(shop: Project, *options: str) -> list[dict[str, Any]]:
    """Run the command; returns the backfills that it tells of."""
    code, output = await shop.run("backfill", *options, "--json")
    assert code == 0, output
    found: list[dict[str, Any]] = json.loads(output)
    return found
