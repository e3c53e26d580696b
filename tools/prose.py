"""Checks prose: words with a plainer or an established replacement, and long sentences: ``python -m tools.prose``.

Reads the manual's Markdown, docstrings, comments and messages; ``--commit FILE`` reads the message of a commit that is
being made. Code is not prose. Not handled: grammar, docs/notes, generated tables, commits that exist.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/guides/*.md")
SOURCES = ("river_compile", "passes", "kernels", "tests", "benchmarks", "examples", "tools")
GENERATED = {"docs/models.md"}  # `python -m tools.families`
MANUAL, CODE, CELL, SUBJECT = 25, 35, 120, 72  # words of a sentence; characters of a cell and of a commit's subject

# Patterns, in any case of letters, and their replacements. Each has to be right wherever it occurs.
WORDS = {
    r"the river(?! (?:backend|command|twins?)\b)": "the twins",
    r"whole river": "all-4bit",
    r"never (?:leave|leaving|exit)": "full depth, speculation off",
    r"in vain": "wasted",
    r"anew|afresh": "again",
    r"at once": "immediately, at the same time",
    r"(?:gives?|gave|giving) way": "is evicted, is replaced",
    r"dear|dearer|dearly": "expensive, slow",
    r"of (?:its|one's|their|his|her|your|my) own": "its own ..., separate",
    r"verdicts?": "decision, result",
    r"prologues?": "embedding stage",
    r"whoever|whosoever": "the caller, the user",
    r"(?:some|no|every|any)body": "no caller, every thread",
    r"all but (?:tie|tied|ties)": "nearly tie",
    r"(?:takes?|taking) turns": "alternates, runs one at a time",
    r"plainly": "without River, unmodified",
    r"kept (?:text|texts)": "prefix cache",
    r"told of": "reported",
    r"(?:is|are|was|were|be|been) told(?! apart)": "is reported, gets, is warned",
    r"refuses? (?:it|them)": "rejects, does not support",
    r"choosers?": "sampler",
    r"weights in (?:\d+|four|eight|twelve|sixteen) bits": "N-bit weights",
    r"beside": "next to, compared with, during",
    r"for good": "permanently",
    r"doubt|doubts|doubted": "defer, uncertain",
    r"(?:go|goes|went|going) on": "continue",
}
_WORDS = [(re.compile(rf"(?<![\w-])(?:{word})(?![\w-])", re.IGNORECASE), say) for word, say in WORDS.items()]
_SENTENCE = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
_ABBREVIATION = re.compile(r"\b(?:e\.g|i\.e|cf|vs|etc|et al|approx|Sec|Fig)\.")
_INLINE = re.compile(r"``.+?``|`[^`]+`|\"[\w-]+\"", re.DOTALL)  # a quoted word is a value
_MARK = re.compile(r"<!-- (?:(end of )|\w+: )")
_COUNTED = re.compile(r"\w")
_C = re.compile(r'R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|(//[^\n]*|/\*.*?\*/)', re.DOTALL)
_SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Attributes:")
_COMMAND = re.compile(r"\s*(?:>>> |\$ |python -m )")
_ENTRY = re.compile(r"\s*(?:[-*] |\S+(?: \S+)* {2,}\S|<)")
CODE_MARK = "CODE"  # stands for inline code, and counts as a word
_PIECES = {"softbreak": "\n", "hardbreak": "\n", "code_inline": CODE_MARK, "image": CODE_MARK}


class Text(NamedTuple):
    """A passage of prose."""

    path: str
    line: int  # of its beginning
    words: str  # newlines as in the source, code replaced by `CODE_MARK`
    counted: str = ""  # the same for the sentence limit, links as one word
    most: int = CODE  # words in a sentence; 0: unlimited
    cell: bool = False


def findings(text: Text) -> Iterator[str]:
    """Yield a line for each word of the list, each sentence that is too long, and a cell that is."""
    for pattern, say in _WORDS:
        if text.cell and "N-bit" in say:
            continue
        for found in pattern.finditer(text.words.replace("\n", " ")):
            line = text.line + text.words[: found.start()].count("\n")
            yield f'{text.path}:{line}: "{found[0]}": say "{say}"'
    if text.cell and len(text.counted.strip()) > CELL:
        yield f"{text.path}:{text.line}: a table cell of {len(text.counted.strip())} characters, {CELL} at most"
    start = 0
    counted = text.counted or text.words
    for end in [*(found.end() for found in _SENTENCE.finditer(counted)), len(counted)]:
        sentence = counted[start:end]
        count = sum(bool(_COUNTED.search(word)) for word in sentence.split())
        if text.most and count > text.most:
            begin, line = " ".join(sentence.split()[:6]), text.line + counted[: start + 1].count("\n")
            yield f"{text.path}:{line}: a sentence of {count} words, {text.most} at most: {begin} ..."
        start = end


def _plain(text: str) -> str:
    """Replace inline code, with as many newlines, and the full stops of abbreviations."""
    text = _INLINE.sub(lambda found: CODE_MARK + "\n" * found[0].count("\n"), text)
    return _ABBREVIATION.sub(lambda found: found[0].replace(".", ""), text)


def markdown(path: str, source: str) -> Iterator[Text]:
    """Yield the paragraphs, headings, list entries and cells of a page."""
    generated, cell = False, False
    for token in MarkdownIt("commonmark").enable("table").parse(source):
        if token.type == "html_block" and (mark := _MARK.match(token.content)):
            generated = not mark[1]
        cell = token.type in ("td_open", "th_open") or (cell and token.type == "inline")
        if token.type != "inline" or generated:
            continue
        words = counted = ""
        links = 0
        for child in token.children or []:
            links += child.nesting if child.type.startswith("link_") else 0
            piece = _PIECES.get(child.type, child.content)
            words += piece
            counted += "LINK" if child.type == "link_open" else piece if not links or piece == "\n" else ""
        line = (token.map[0] if token.map else 0) + 1
        yield Text(path, line, _plain(words), _plain(counted), most=0 if cell else MANUAL, cell=cell)


def python(path: str, source: str) -> Iterator[Text]:
    """Yield the docstrings, comments and messages of a Python file."""
    yield from _joined(path, source, _comments(source))
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if ast.get_docstring(node):
                expression = node.body[0]
                assert isinstance(expression, ast.Expr)
                assert isinstance(expression.value, ast.Constant)
                yield from _docstring(path, expression, str(expression.value.value))
            case ast.Raise(exc=ast.Call(args=arguments)):
                yield from _messages(path, arguments)
            case ast.Call(func=ast.Attribute(attr="warn"), args=arguments):
                yield from _messages(path, arguments)
            case ast.keyword(arg="help", value=value):
                yield from _messages(path, [value])


def _docstring(path: str, node: ast.Expr, text: str) -> Iterator[Text]:
    """Yield a docstring's passages; a block that is indented outside of a section of Google's style is code."""
    lines, section = [line.removeprefix(" " * node.col_offset) for line in text.split("\n")], False
    for number, content in enumerate(lines):
        indented = content.startswith(" ")
        heading = content.strip() in _SECTIONS
        section = heading or (section and (indented or not content))
        if heading or (content.startswith("    ") and not section) or _COMMAND.match(content):
            lines[number] = ""
        elif section and re.match(r"    \S", content):
            lines[number] = f"- {content.strip()}"
    yield from _passages(path, node.lineno, lines)


def _comments(source: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yield the line, column and text of each comment of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# type:", "# noqa", "# fmt:")):
            yield *token.start, [token.string.lstrip("#:")]


def _joined(path: str, source: str, comments: Iterable[tuple[int, int, list[str]]]) -> Iterator[Text]:
    """Yield the passages of comments; those below each other, in one column and without code, are one block."""
    lines = source.split("\n")
    block: list[str] = []
    begin = at = 0
    for line, column, content in comments:
        if lines[line - 1][:column].strip() or (line, column) != (begin + len(block), at):
            yield from _passages(path, begin, block)
            begin, at, block = line, column, []
        block += content
    yield from _passages(path, begin, block)


def _passages(path: str, line: int, lines: list[str]) -> Iterator[Text]:
    """Yield the passages of lines: each ends before an empty line, an entry of a list and a row of columns."""
    start = 0
    for number, content in enumerate([*lines, ""]):
        if number > start and (not content.strip() or _ENTRY.match(content)):
            yield Text(path, line + start, _plain("\n".join(lines[start:number])))
            start = number
        if not content.strip():
            start = number + 1


def _messages(path: str, values: Iterable[ast.expr]) -> Iterator[Text]:
    for value in values:
        for part in ast.walk(value):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield Text(path, part.lineno, _plain(part.value), most=0)


def native(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a C++ file."""

    def comments() -> Iterator[tuple[int, int, list[str]]]:
        for found in filter(lambda found: found[2], _C.finditer(source)):
            column = found.start() - source.rfind("\n", 0, found.start()) - 1
            lines = [re.sub(r"^\s*/?[/*]+|\*/$", "", content) for content in found[2].split("\n")]
            yield source.count("\n", 0, found.start()) + 1, column, lines

    yield from _joined(path, source, comments())


def texts(root: Path = ROOT) -> Iterator[Text]:
    """Yield all prose of a repository."""
    sources = [f"{folder}/**/*{ending}" for folder in SOURCES for ending in (".py", ".h", ".cpp")]
    for file in sorted(file for pattern in (*PAGES, *sources) for file in root.glob(pattern)):
        path = file.relative_to(root).as_posix()
        if path not in GENERATED:
            read = {".md": markdown, ".py": python}.get(file.suffix, native)
            yield from read(path, file.read_text(encoding="utf-8"))


def subject(message: str) -> Iterator[str]:
    """Yield what is wrong with the first line of a commit's message."""
    line = message.split("\n", 1)[0]
    if len(line) > SUBJECT:
        yield f"the commit's subject has {len(line)} characters, {SUBJECT} at most"
    yield from findings(Text("the commit's subject", 1, _plain(line), most=0))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Checks the words and sentences of pages, docstrings and comments.")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to check (default: this one)")
    parser.add_argument("--commit", type=Path, metavar="FILE", help="check the commit message in this file instead")
    options = parser.parse_args(arguments)
    if options.commit:
        found = [*subject(options.commit.read_text(encoding="utf-8"))]
    else:
        found = [line for text in texts(options.root) for line in findings(text)]
    print("\n".join(found) if found else "no findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
