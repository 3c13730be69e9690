"""What is tested, and on which tables."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tailrace_tables() -> Path:
    """The tables of the example, as its README has them made."""
    return Path(__file__).parent.parent / "schema.sql"


@pytest.fixture(scope="session")
def tailrace_handlers() -> str:
    """What HANDLERS says."""
    return "examples.fastapi_app.handlers"
