"""Breaks a kernel in one place at a time, in a copy of the checkout, and shows which tests notice.

    python -m tools.mutations                                   # all of `table.py`; hours
    python -m tools.mutations kv-bound --report docs/notes/mutations.md

The report stands between two marks of a document; mutations that were not tried keep their rows. The exit status is 1
if a mutation survives or could not be tried.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .table import MUTATIONS
from .trial import ROOT, Mutation, Untried, attempt

BEGIN, END = "<!-- mutations: python -m tools.mutations -->\n", "<!-- end of mutations -->\n"
HEAD = "| mutation | what goes wrong | file | noticed by |\n|---|---|---|---|\n"
_ROW = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", re.MULTILINE)


def reported(document: str, said: Mapping[str, str], mutations: Sequence[Mutation] = MUTATIONS) -> str:
    """Return a document with what was said of mutations between its marks; others keep their rows."""
    before, _, rest = document.partition(BEGIN)
    inside, _, after = rest.partition(END)
    cells = {**dict(_ROW.findall(inside)), **said}
    rows = [f"| `{m.id}` | {m.breaks} | `{m.file}` | {cells.get(m.id, 'not tried')} |\n" for m in mutations]
    return f"{before}{BEGIN}\n{HEAD}{''.join(rows)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS, root: Path = ROOT) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ids", nargs="*", metavar="ID", help=f"of {', '.join(m.id for m in mutations)}; all")
    parser.add_argument("--report", type=Path, help="a Markdown document that receives a table")
    options = parser.parse_args(arguments)
    said: dict[str, str] = {}
    for mutation in (m for m in mutations if not options.ids or m.id in options.ids):
        try:
            test = attempt(mutation, root)
            said[mutation.id] = f"`{test}`" if test else "**nothing**"
        except Untried as error:
            said[mutation.id] = "could not be tried"
            print(error)
        print(f"{mutation.id:20} {said[mutation.id]}", flush=True)
        if options.report is not None:
            known = options.report.read_text(encoding="utf-8") if options.report.exists() else ""
            options.report.write_text(reported(known, said, mutations), encoding="utf-8")
    return int(not all(text.startswith("`") for text in said.values()))


if __name__ == "__main__":
    raise SystemExit(main())
