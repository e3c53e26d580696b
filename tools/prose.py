"""Checks prose for words with a plainer or an established replacement: ``python -m tools.prose``.

Reads the manual's and the notes' Markdown, docstrings, comments and messages; ``--commit FILE`` reads the message of a
commit that is being made. Not handled: grammar, generated tables, commits that exist.
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

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/guides/*.md")
NOTES = ("docs/notes/*.md",)
SOURCES = ("river_compile", "passes", "kernels", "tests", "benchmarks", "examples", "tools")
GENERATED = {"docs/models.md"}  # `python -m tools.families`
SUBJECT = 72  # characters of a commit's first line

# Patterns, in any case of letters, and their replacements. Each has to be right wherever it occurs.
WORDS = {
    r"the river(?! (?:backend|command|twins?)\b)": "the twins",
    r"whole river": "all-4bit",
    r"never (?:leave|leaving|exit)": "full depth, without drafts",
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
    r"\w*(?:colour|favour|behaviour|neighbour)\w*|licences?|modelled|labelled|recognise[ds]": "the American spelling",
}
_WORDS = [(re.compile(rf"(?<![\w-])(?:{word})(?![\w-])", re.IGNORECASE), say) for word, say in WORDS.items()]
_INLINE = re.compile(r"``.+?``|`[^`]+`|\"[\w-]+\"", re.DOTALL)  # a quoted word is a value
_PAGES_CODE = re.compile(
    r"^```.*?^```|<!-- (\w+): .*?<!-- end of \1 -->|<!--.*?-->|\]\([^)\s]+\)", re.DOTALL | re.MULTILINE
)
_C = re.compile(r'R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|(//[^\n]*|/\*.*?\*/)', re.DOTALL)
_SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "Attributes:")
_COMMAND = re.compile(r"\s*(?:>>> |\$ |python -m )")


def findings(path: str, text: str) -> Iterator[str]:
    """Yield a line for each word of the list in prose; `N-bit` is not asked of rows of tables."""
    flat = _INLINE.sub(lambda found: re.sub(r"[^\n]", "#", found[0]), text).replace("\n", " ")
    lines = text.split("\n")
    for pattern, say in _WORDS:
        for found in pattern.finditer(flat):
            line = text.count("\n", 0, found.start())
            if not (lines[line].startswith("|") and "N-bit" in say):
                yield f'{path}:{line + 1}: "{found[0]}": say "{say}"'


def markdown(source: str) -> str:
    """Return a page without code, generated tables and addresses, which leave their line breaks."""
    return _PAGES_CODE.sub(lambda found: re.sub(r"[^\n]", "#", found[0]), source)


def python(source: str) -> str:
    """Return the docstrings, comments and messages of a Python file, on their lines."""
    lines = [""] * (source.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("#!", "# type:", "# noqa", "# fmt:")):
            lines[token.start[0] - 1] += token.string.lstrip("#:")
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if ast.get_docstring(node):
                expression = node.body[0]
                assert isinstance(expression, ast.Expr)
                assert isinstance(expression.value, ast.Constant)
                for number, line in enumerate(_docstring(str(expression.value.value), expression.col_offset)):
                    lines[expression.lineno - 1 + number] += line
            case ast.Raise(exc=ast.Call(args=values)) | ast.Call(func=ast.Attribute(attr="warn"), args=values):
                _add_messages(lines, values)
            case ast.keyword(arg="help", value=value):
                _add_messages(lines, [value])
    return "\n".join(lines)


def _docstring(text: str, indent: int) -> Iterator[str]:
    """Yield a docstring's lines; a block that is indented outside of a section of Google's style is code."""
    section = False
    for line in (line.removeprefix(" " * indent) for line in text.split("\n")):
        section = line.strip() in _SECTIONS or (section and (line.startswith(" ") or not line))
        code = (line.startswith("    ") and not section) or _COMMAND.match(line)
        yield "" if code else line


def _add_messages(lines: list[str], values: Iterable[ast.expr]) -> None:
    for value in values:
        for part in ast.walk(value):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                lines[part.lineno - 1] += " " + part.value.replace("\n", " ")


def native(source: str) -> str:
    """Return the comments of a C++ file, on their lines."""
    parts, end = [], 0
    for found in filter(lambda found: found[2], _C.finditer(source)):
        parts += ["\n" * source.count("\n", end, found.start()), re.sub(r"(?m)^\s*/?[/*]+|\*/$", "", found[2])]
        end = found.end()
    return "".join(parts)


def prose(root: Path = ROOT) -> Iterator[tuple[str, str]]:
    """Yield the path of each page and source of a repository, and its prose."""
    sources = [f"{folder}/**/*{ending}" for folder in SOURCES for ending in (".py", ".h", ".cpp")]
    for file in sorted(file for pattern in (*PAGES, *NOTES, *sources) for file in root.glob(pattern)):
        path = file.relative_to(root).as_posix()
        if path not in GENERATED:
            yield path, {".md": markdown, ".py": python}.get(file.suffix, native)(file.read_text(encoding="utf-8"))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Checks the words of pages, docstrings, comments and messages.")
    parser.add_argument("--root", type=Path, default=ROOT, help="repository to check (default: this one)")
    parser.add_argument("--commit", type=Path, metavar="FILE", help="check the commit message in this file instead")
    options = parser.parse_args(arguments)
    if options.commit:
        subject = options.commit.read_text(encoding="utf-8").split("\n", 1)[0]
        found = [*findings("the commit's subject", subject)]
        if len(subject) > SUBJECT:
            found.append(f"the commit's subject has {len(subject)} characters, {SUBJECT} at most")
    else:
        found = [line for path, text in prose(options.root) for line in findings(path, text)]
    print("\n".join(found) if found else "no findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
