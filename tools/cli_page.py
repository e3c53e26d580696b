"""Writes the commands' arguments and options into docs/cli.md, from their help: ``python -m tools.cli_page``.

The tables stand between two marks there; exit codes, JSON and the rows of `river bench` are written by hand.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import typer.main

from river_compile.cli.app import app
from tools.marked import ROOT, filled

PAGE = ROOT / "docs/cli.md"


def commands() -> str:
    """Return a section for each command, in the order of `river --help`."""
    river: Any = typer.main.get_command(app)
    return "\n".join(line for name, command in river.commands.items() for line in _section(name, command))


def replaced() -> str:
    """Return the page with the commands' sections between its marks."""
    return filled(PAGE, "commands", lambda _: commands())


def _section(name: str, command: Any) -> Iterator[str]:
    yield f"## river {name}\n"
    yield f"{inspect.cleandoc(command.help)}\n"
    yield "| argument or option | default | meaning |\n|---|---|---|"
    for parameter in command.params:
        names = _names(parameter)
        if "--help" not in names:
            yield f"| {names} | {_default(parameter)} | {_cell(parameter.help)} |"
    yield ""


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    short_first = sorted([*parameter.opts, *parameter.secondary_opts], key=lambda name: name.startswith("--"))
    return ", ".join(f"`{name}`" for name in short_first)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False or parameter.default == "":
        return ""
    return "on" if parameter.default is True else f"`{parameter.default}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def main() -> int:
    """Write the page; return the exit status."""
    PAGE.write_text(replaced(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
