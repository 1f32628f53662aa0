"""The documentation as data: pages, their fenced blocks, headings and links."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt

from bench.report import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
_PARSER = MarkdownIt("commonmark").enable("table")


@dataclass(frozen=True)
class Block:
    """One fenced block, with the page and line that it stands at."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """Return a page's fenced blocks."""
    for token in _PARSER.parse(page.read_text("utf-8")):
        if token.type == "fence" and token.map is not None:
            yield Block(str(page.relative_to(ROOT)), token.map[0] + 1, token.info.strip(), token.content)


def modules(page: Path) -> dict[str, str]:
    """Return the Python files that a page shows: a block's first line names its file."""
    found = {}
    for block in blocks(page):
        named = re.match(r"# (\w+\.py)\n", block.text)
        if block.language == "python" and named:
            found[named.group(1)] = block.text
    return found


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    tokens = _PARSER.parse(page.read_text("utf-8"))
    return {slug(after.content) for token, after in pairwise(tokens) if token.type == "heading_open"}


def slug(heading: str) -> str:
    """Return a heading's anchor."""
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def links(page: Path) -> Iterator[str]:
    """Return where a page's links and images point."""
    for token in _PARSER.parse(page.read_text("utf-8")):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if isinstance(target, str):
                yield target
