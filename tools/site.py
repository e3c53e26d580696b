"""MkDocs' hooks: README.md is the front page, and a link out of docs/ becomes plain text, or a link on the repository.

Lists may follow a paragraph without an empty line, as on GitHub. Not handled: reference links and links in raw HTML.
"""

from __future__ import annotations

import os.path
import re

from markdown_it import MarkdownIt
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^()\s]+)\)")
_CODE = re.compile(r"^(?:```.*?^```|~~~.*?^~~~)$|`[^`\n]+`(?!\])", flags=re.MULTILINE | re.DOTALL)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|/")
FRONT = "index.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as the front page."""
    readme = os.path.join(os.path.dirname(config.config_file_path), "README.md")
    files.append(File.generated(config, FRONT, abs_src_path=readme))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page as Python-Markdown needs it, its links relative to docs/."""
    folder = "" if page.file.src_uri == FRONT else os.path.join("docs", os.path.dirname(page.file.src_uri))
    return rewritten(spaced(markdown), folder, {f.src_uri for f in files}, config.repo_url)


def spaced(markdown: str) -> str:
    """Insert the empty line that Python-Markdown needs between a paragraph and a list."""
    lines = markdown.split("\n")
    starts = [
        token.map[0]
        for token in MarkdownIt("commonmark").enable("table").parse(markdown)
        if token.type in ("bullet_list_open", "ordered_list_open") and token.map and token.level == 0
    ]
    for start in sorted(starts, reverse=True):
        if start and lines[start - 1].strip():
            lines.insert(start, "")
    return "\n".join(lines)


def rewritten(markdown: str, folder: str, pages: set[str], repo_url: str | None = None) -> str:
    """Rewrite the links of a page of the repository.

    Args:
        markdown: the page.
        folder: the page's folder, relative to the repository's root.
        pages: files of the site, relative to docs/.
        repo_url: address of the repository; None: a link out of docs/ keeps its text only.
    """

    def link(found: re.Match[str]) -> str:
        image, text, target = found.groups()
        if _ELSEWHERE.match(target):
            return found[0]
        path, mark, anchor = target.partition("#")
        place = os.path.normpath(os.path.join(folder, path))
        page = FRONT if place == "README.md" else os.path.relpath(place, "docs")
        if page in pages or not page.startswith(".."):
            return f"{image}[{text}]({os.path.relpath(page, below)}{mark}{anchor})"
        if repo_url:
            return f"{image}[{text}]({repo_url.rstrip('/')}/blob/main/{place}{mark}{anchor})"
        return text if "`" in text or " " in text else f"`{text}`"

    below = os.path.relpath(folder, "docs") if folder else "."
    code = [found.span() for found in _CODE.finditer(markdown)]
    parts, end = [], 0
    for found in _LINK.finditer(markdown):
        if not any(start <= found.start() < stop for start, stop in code):
            parts += [markdown[end : found.start()], link(found)]
            end = found.end()
    return "".join([*parts, markdown[end:]])
