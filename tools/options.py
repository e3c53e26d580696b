"""Writes the options of the backend into README.md: ``python -m tools.options README.md``.

The tables stand between two marks there. Without a file the tables are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from river_compile.config import EXPERT, USER, RiverConfig

BEGIN, END = "<!-- options: python -m tools.options README.md -->\n", "<!-- end of options -->\n"


def markdown() -> str:
    """Returns three tables: what everyone sets, what experts set, what is for tests."""
    return (
        _table(USER)
        + "\nFor experts:\n\n"
        + _table(EXPERT)
        + "\nFor tests and debugging:\n\n| value | meaning |\n|---|---|\n"
        + "".join(
            f"| `{name}={_text(option.for_tests[0])}` | {option.for_tests[1]} |\n"
            for name, option in RiverConfig.options().items()
            if option.for_tests
        )
    )


def replaced(text: str) -> str:
    """Returns a document with the tables between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + markdown() + "\n" + END + rest.split(END)[1]


def _table(audience: str) -> str:
    defaults = vars(RiverConfig)
    rows = [
        f"| `{name}` | {_code(defaults[name])} | {option.text} |\n"
        for name, option in RiverConfig.options().items()
        if option.audience == audience
    ]
    return "| option | default | meaning |\n|---|---|---|\n" + "".join(rows)


def _code(default: object) -> str:
    return str(default) if type(default) is int else f"`{_text(default)}`"


def _text(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Writes the tables of the backend's options into a document.")
    parser.add_argument("document", type=Path, nargs="?", help="the file, such as README.md; none: print the tables")
    document = parser.parse_args(arguments).document
    if document is None:
        print(markdown(), end="")
    else:
        document.write_text(replaced(document.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
