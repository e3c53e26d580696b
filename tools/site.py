"""MkDocs' hooks: README.md is the front page; a link out of docs/ becomes plain text, or a link on the repository.

Lists may follow a paragraph without an empty line, as on GitHub. Tables fit a phone: long code may break, and tables of
words carry what ``docs/assets/site.css`` needs to show a row below the other. Not handled: reference links and links in
raw HTML.
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
_RANGE = re.compile(r"\([\d.]+(?:–| to )[\d.]+(?: %)?\)")
_TABLE = re.compile(r"<table>.*?</table>", flags=re.DOTALL)
_CELL = re.compile(r"<(t[dh])(?: [^>]*)?>(.*?)</\1>", flags=re.DOTALL)
_TABLE_CODE = re.compile(r"<code>([^<]+)</code>")
_BREAKS = re.compile(r"(?<=[/_.:=(,])(?=[\w&\"])")  # where code may go to the next line
_LONG = 40  # characters of code that may break in a wide window too
FRONT = "index.md"
OUTSIDE = {"README.md": FRONT, "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Drop the edit links of pages if the repository has no address, which MkDocs would warn of."""
    if not config.repo_url:
        config.edit_uri = None
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `OUTSIDE`, which lie at the repository's root."""
    root = os.path.dirname(config.config_file_path)
    for path, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=os.path.join(root, path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page as Python-Markdown needs it, its links relative to docs/."""
    at_root = page.file.src_uri in OUTSIDE.values()
    folder = "" if at_root else os.path.join("docs", os.path.dirname(page.file.src_uri))
    return rewritten(spaced(markdown), folder, {f.src_uri for f in files}, config.repo_url)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep each range of a table on one line, so that narrow columns break before it; prepare tables for phones."""
    return _TABLE.sub(lambda table: _for_phones(table[0]), _RANGE.sub(r'<span class="river-range">\g<0></span>', html))


def _for_phones(table: str) -> str:
    """Let long code break; label the cells of a table of three columns of words or more."""
    table = _TABLE_CODE.sub(_breakable, table)
    labels = [re.sub(r"<[^>]+>", "", text).replace('"', "&quot;") for tag, text in _CELL.findall(table) if tag == "th"]
    if len(labels) < 3 or "text-align: right" in table:
        return table
    head, body = table.replace("<table>", "<table data-rows>", 1).split("</thead>")
    cells = iter(range(body.count("<td")))
    return f"{head}</thead>" + re.sub(r"<td", lambda _: f'<td data-label="{labels[next(cells) % len(labels)]}"', body)


def _breakable(code: re.Match[str]) -> str:
    long = ' class="river-long"' if len(code[1]) > _LONG else ""
    return f"<code{long}>{_BREAKS.sub('<wbr>', code[1])}</code>"


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
        page = OUTSIDE.get(place) or os.path.relpath(place, "docs")
        if page in pages or not (page.startswith("..") or place in OUTSIDE):
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
