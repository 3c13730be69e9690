"""The recipes of docs/recipes.md: their files are written as the page names them, and their tests are run."""

from pathlib import Path

from tests.kit.projects import run_pytest
from tests.pages import blocks, prose
from tests.stack import ROOT

PAGE = "docs/recipes.md"
INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings = error
"""


async def test_the_recipes_do_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text(INI)
    files = {block.file: block.text for block in blocks(page=PAGE)}
    assert None not in files, "each block begins with the name of its file"
    for name, text in files.items():
        path = tmp_path / str(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "handlers/__init__.py").touch()
    code, output = await run_pytest(tmp_path)
    assert code == 0, output
    tests = "".join(files.values()).count("\nasync def test_")
    assert tests == prose(ROOT / PAGE).count("\n## "), "each recipe has its test"
    assert f"{tests} passed" in output
