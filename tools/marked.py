"""Text that a program writes between two marks of a Markdown page.

``<!-- KIND: ARGUMENTS -->`` begins it and ``<!-- end of KIND -->`` ends it; each mark stands on a separate line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pages(kind: str, root: Path = ROOT) -> list[Path]:
    """Return README.md and the pages below docs/ that have marks of a kind."""
    every = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in every if f"<!-- {kind}: " in page.read_text(encoding="utf-8")]


def filled(page: Path, kind: str, write: Callable[[str], str]) -> str:
    """Return a page's text with new content between its marks.

    Args:
        page: the file.
        kind: of the marks.
        write: takes a mark's arguments and returns the content, which ends with a line break.

    Raises:
        ValueError: the page has no mark of that kind, or one without its end.
    """
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {kind}: ", f"<!-- end of {kind} -->\n"
    head, *rest = text.split(begin)
    if not rest or any(part.count(end) != 1 for part in rest) or end in head:
        raise ValueError(f"{page} needs a line {end.strip()} after each line that begins with {begin.strip()}")
    pattern = re.compile(rf"({begin}(.*?) -->\n).*?({end})", re.DOTALL)
    return pattern.sub(lambda mark: f"{mark[1]}\n{write(mark[2])}\n{mark[3]}", text)
