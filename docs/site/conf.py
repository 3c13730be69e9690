"""The documentation as a site, for Sphinx: `make docs`.

The pages are read where they lie, as they are: nothing here is needed to read them in the repository. What
only a site needs is made while they are read, from docs/index.md and from their links.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]

project = "Tailrace"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = [
    "*.md",
    "docs/*.md",
    "deploy/*.md",
    "standin/*.md",
    "examples/*/*.md",
]
myst_heading_anchors = 4

html_theme = "furo"
html_title = "Tailrace"
html_extra_path = ["front"]
html_show_copyright = False
html_copy_source = False

_LINK = re.compile(r"\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def _toctrees(text: str) -> str:
    """Make a table of contents of each section's links: the order of the site is that of the page."""
    made = []
    for section in text.split("\n## ")[1:]:
        caption, _, body = section.partition("\n")
        pages = [
            target.removesuffix(".md")
            for _, target, _ in _LINK.findall(body)
            if not re.match("[a-z]+:", target)
        ]
        entries = "\n".join("/" + _from_root(ROOT / "docs", page) for page in dict.fromkeys(pages))
        made.append(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```")
    return "\n\n".join([text, *made])


def _from_root(folder: Path, target: str) -> str:
    path = (folder / target).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""


def _read(app: Sphinx, page: str, content: list[str]) -> None:
    """Leave of links to code and folders, which the site does not have, the words."""
    folder = (ROOT / page).parent

    def kept(link: re.Match[str]) -> str:
        words, target, _ = link.groups()
        here = _from_root(folder, target)
        # What does not exist stays a link, so that Sphinx complains of it.
        if re.match("[a-z]+:", target) or here.removesuffix(".md") in app.env.found_docs:
            return link[0]
        return words if (folder / target).exists() else link[0]

    content[0] = _LINK.sub(kept, content[0])
    if page == root_doc:
        content[0] = _toctrees(content[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read)
