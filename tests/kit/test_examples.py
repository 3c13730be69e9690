"""Tests that examples bring along, run as their readers would run them."""

from pathlib import Path

import pytest

from tests.kit.projects import run_pytest
from tests.stack import ROOT

FOLDERS = sorted(str(one.parent.relative_to(ROOT)) for one in ROOT.glob("examples/*/tests/conftest.py"))


def test_there_are_some() -> None:
    assert FOLDERS


@pytest.mark.parametrize("folder", FOLDERS)
async def test_the_tests_of_an_example_pass(folder: str, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    loops = ("-o", "asyncio_default_fixture_loop_scope=function", "--asyncio-mode=auto")
    code, output = await run_pytest(tmp_path, *loops, "-c", str(tmp_path / "pytest.ini"), str(ROOT / folder))
    assert code == 0, output
    assert "passed" in output
