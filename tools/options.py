"""Writes the backend's options into README.md (those of users) and docs/options.md (all): ``python -m tools.options``.

The tables stand between two marks there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from river_compile.config import EXPERT, USER, RiverConfig
from tools.marked import ROOT, filled

README, DOCS = ROOT / "README.md", ROOT / "docs/options.md"


def tables(document: Path) -> str:
    """Return a document's tables: README's has what most users set, the page in docs/ everything, with types."""
    if document == README:
        return _table(USER, typed=False)
    whole = "\n".join(
        [
            _table(USER),
            f"For experts:\n\n{_table(EXPERT)}",
            "For tests and debugging:\n\n| value | meaning |\n|---|---|",
            *(
                f"| `{name}={_text(option.for_tests[0])}` | {option.for_tests[1]} |"
                for name, option in RiverConfig.options().items()
                if option.for_tests
            ),
        ]
    )
    return whole.replace("[docs/", "[").replace("](docs/", "](") + "\n"


def replaced(document: Path) -> str:
    """Return a document's text with its tables between the marks."""
    return filled(document, "options", lambda _: tables(document))


def _table(audience: str, typed: bool = True) -> str:
    head = (
        "| option | type | default | meaning |\n|---|---|---|---|\n"
        if typed
        else "| option | default | meaning |\n|---|---|---|\n"
    )
    defaults, types = vars(RiverConfig), RiverConfig.__annotations__
    rows = []
    for name, option in RiverConfig.options().items():
        if option.audience == audience:
            kind = types[name].replace("Threshold", "float | list[float]").replace(" | ", "` or `")
            kind = f"`{kind}` | " if typed else ""
            rows.append(f"| `{name}` | {kind}{_code(defaults[name])} | {option.text} |\n")
    return head + "".join(rows)


def _code(default: object) -> str:
    return str(default) if type(default) is int else f"`{_text(default)}`"


def _text(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argparse.ArgumentParser(description="Writes the tables of the backend's options.").parse_args(arguments)
    for document in (README, DOCS):
        document.write_text(replaced(document), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
