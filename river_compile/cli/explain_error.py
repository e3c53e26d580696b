"""``river explain-error RC021``: the section of docs/troubleshooting.md about an error or a warning.

Packages contain that page, so that its text is there without a clone and without a network.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Annotated

import typer

from river_compile.cli.shared import AsJson, show

_SECTION = re.compile(r"^### (RC\d+): (.+)\n\n((?:(?!<a |#).*\n?)+)", re.MULTILINE)
_LINK = re.compile(r"\[([^\]]+)\]\([^)]+\)")


def sections() -> dict[str, tuple[str, str]]:
    """Return title and text of each id's section: Markdown without links, a paragraph a line."""
    page = resources.files("river_compile.docs").joinpath("troubleshooting.md").read_text(encoding="utf-8")
    found = _SECTION.findall(_LINK.sub(r"\1", page))
    return {id: (title, re.sub(r"(?<!\n)\n(?!\n)", " ", text.strip())) for id, title, text in found}


def explain_error(
    id: Annotated[str, typer.Argument(help="The id that a message begins with, such as RC021.")],
    as_json: AsJson = False,
) -> None:
    """Explain an error or a warning by its id: the cause and the fix."""
    known, wanted = sections(), id.upper()
    if wanted not in known:
        raise ValueError(f"{id} is no id of an error or a warning. Ids are {', '.join(known)}")
    title, text = known[wanted]
    result = {"id": wanted, "title": title, "text": text}
    show("explain-error", result, as_json, lambda console: console.print(f"{wanted}: {title}\n\n{text}", markup=False))
