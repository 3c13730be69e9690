"""The documentation as a site: built as `make docs` builds it, with warnings as errors."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES
from tests.stack import ROOT

LOADED = re.compile(r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=\"([^\"]+)\"")


def command(out: Path) -> list[str]:
    """The line of the Makefile, with another place for what it makes."""
    (line,) = re.findall(r"^docs: .*\n\t(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    words = line.replace("$(BIN)/python", sys.executable).split()
    return [word.replace("build/", f"{out}/") if word.startswith("build/") else word for word in words]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("furo", reason="requirements.lock has changed: make setup")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return out / "site"


def test_every_page_is_on_the_site_and_within_its_contents(site: Path) -> None:
    pages = [str(path.relative_to(ROOT).with_suffix(".html")) for path in PAGES]
    assert [page for page in pages if not (site / page).exists()] == []
    contents = (site / "docs/index.html").read_text().split('class="sidebar-tree"')[1].split("</aside>")[0]
    linked = {(site / "docs" / href).resolve() for href in re.findall(r'href="([^"#]+)"', contents)}
    assert [page for page in pages if page != "docs/index.html" and site / page not in linked] == []


def test_the_site_begins_where_browsers_look(site: Path) -> None:
    (target,) = re.findall(r'url=([^"]+)"', (site / "index.html").read_text())
    assert (site / target).exists()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = {
        address
        for page in site.rglob("*.html")
        for address in LOADED.findall(page.read_text())
        if not page.is_relative_to(site / "_static")
    }
    assert len(loaded) > 5
    assert [address for address in loaded if re.match(r"(?:[a-z]+:)?//", address)] == []
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"url\(['\"]?(?:https?:)?//[^)]*\)|@import[^;]*//[^;]*;", styles) == []
