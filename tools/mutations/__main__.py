"""Breaks the product in one place at a time, in a copy of the checkout, and shows which tests notice.

    python -m tools.mutations --list
    python -m tools.mutations --only exit-at-threshold kv-bound          # these
    python -m tools.mutations --whole --report docs/notes/mutations.md     # all; survivors meet the whole default run

Every mutation (`table.py`) first meets the tests that are likely to notice it. The report stands between two marks of a
document; mutations that were not tried this time keep their rows. The exit status is 1 if a mutation survives, and 2
if the table does not fit the sources or a trial says nothing.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from .table import MUTATIONS
from .trial import ROOT, Mutation, Outcome, attempt

BEGIN, END = "<!-- mutations: python -m tools.mutations -->\n", "<!-- end of mutations -->\n"
HEAD = "| mutation | what goes wrong | file | noticed by |\n|---|---|---|---|\n"
_ROW = re.compile(r"^\| `([^`]+)` \|.*\| ([^|]+) \|$", re.MULTILINE)


def reported(document: str, outcomes: Iterable[Outcome], mutations: Sequence[Mutation] = MUTATIONS) -> str:
    """Return a document with the outcomes between its marks; other mutations keep their rows."""
    before, _, rest = document.partition(BEGIN)
    inside, _, after = rest.partition(END)
    noticed = dict(_ROW.findall(inside))
    for mutation, noticed_by, problem, _ in outcomes:
        noticed[mutation.id] = f"`{noticed_by}`" if noticed_by else "could not be tried" if problem else "**nothing**"
    rows = [f"| `{m.id}` | {m.breaks} | `{m.file}` | {noticed.get(m.id, 'not tried')} |\n" for m in mutations]
    return f"{before}{BEGIN}\n{HEAD}{''.join(rows)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None, mutations: Sequence[Mutation] = MUTATIONS, root: Path = ROOT) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutations", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the mutations and run nothing")
    parser.add_argument("--only", nargs="+", metavar="ID", help="try these")
    parser.add_argument("--whole", action="store_true", help="then the rest of the default run if no likely test fails")
    parser.add_argument("--jobs", type=int, default=2, help="mutations tried at the same time (default: %(default)s)")
    parser.add_argument("--report", type=Path, help="a Markdown document that receives a table")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {mutation.id for mutation in mutations}
    if unknown:
        parser.error(f"no mutation {unknown.pop()!r}; --list names them")
    chosen = [mutation for mutation in mutations if not options.only or mutation.id in options.only]
    if options.list:
        print("\n".join(f"{m.id:20} {m.breaks} ({m.file})" for m in chosen))
        return 0
    unfit = [why for mutation in chosen if (why := mutation.unfit(root))]
    if unfit:
        print("\n".join(unfit))
        return 2
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for job in as_completed([pool.submit(attempt, mutation, options.whole, root) for mutation in chosen]):
            outcomes.append(job.result())
            print(_line(outcomes[-1]), flush=True)
            if options.report is not None:
                known = options.report.read_text(encoding="utf-8") if options.report.exists() else ""
                options.report.write_text(reported(known, outcomes, mutations), encoding="utf-8")
    noticed = sum(bool(outcome.noticed_by) for outcome in outcomes)
    print(f"{noticed} of {len(outcomes)} mutations were noticed")
    return 2 if any(outcome.problem for outcome in outcomes) else int(noticed < len(outcomes))


def _line(outcome: Outcome) -> str:
    said = outcome.noticed_by or outcome.problem or "NOT NOTICED"
    return f"{outcome.mutation.id:20} {outcome.seconds:6.0f} s  {said}"


if __name__ == "__main__":
    raise SystemExit(main())
