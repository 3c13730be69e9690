"""The pages of the documentation and the fenced blocks on them, as the tests of both read them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.stack import ROOT

PAGES = sorted(
    path for pattern in ("*.md", "docs/*.md", "deploy/*.md", "standin/*.md") for path in ROOT.glob(pattern)
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"(?:#|--|//) ([\w./-]+\.\w+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str
    section: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.text.strip().splitlines()[0][:40]}"

    @property
    def file(self) -> str | None:
        """The file that the block is to be written to, where its first line is a comment that names one."""
        named = _FILE.match(self.text)
        return named[1] if named else None


def blocks(*languages: str, page: str | None = None, section: str | None = None) -> list[Block]:
    """All blocks in these languages (without: in all), of one page or section if it is named."""
    return [
        block
        for path in PAGES
        if page is None or str(path.relative_to(ROOT)) == page
        for block in _of(path)
        if not languages or block.language in languages
        if section is None or block.section == section
    ]


def _of(path: Path) -> Iterator[Block]:
    page = path.read_text()
    for found in FENCE.finditer(page):
        indent, language, text = found.groups()
        headings = re.findall(r"^## (.+)$", FENCE.sub("", page[: found.start()]), re.MULTILINE)
        plain = re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)
        yield Block(str(path.relative_to(ROOT)), language, plain, headings[-1] if headings else "")


def prose(path: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", path.read_text())
