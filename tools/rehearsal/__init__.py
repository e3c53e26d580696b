"""The steps of `make gpu` as they are rehearsed, what went wrong in one, and what it would take on a card.

A rehearsed step is the same commands through `tools.rehearsal`, with a few arguments more. Programs that note a failure
and continue have status 0; what they noted counts here (:func:`shortcomings`). Minutes on a card are an estimate: what
the rehearsal counted (processes, kernels, graphs, captures, timings, tests), each at its `SECONDS`, and the tokens of
full size by the cost model (`benchmarks.roofline`).

Not handled: numbers of the rehearsal as figures. They mean nothing.
"""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import decode
from benchmarks.cuda_decode import rows_of
from benchmarks.estimate import exact_cycle
from benchmarks.roofline import Roofline
from tools.kernels.shapes import MODELS, model_kernels

if TYPE_CHECKING:
    from tools.gpu import Step

COUNTS = "RIVER_REHEARSAL_COUNTS"  # a variable: the file of counts
MINUTES = 600.0  # of a rehearsed step: its limit is the card's, and a machine without one may be slow
#: Arguments of a program besides those on a card: later options win.
SMALLER = {
    "benchmarks.kernels": ("--context", "64"),
    "tools.kernels.tune": ("--top", "2", "--budget", "1e6"),
    "benchmarks.decode": (
        *("--new-tokens", "6", "--context", "20", "--depths", "never", "0", "3", "--threads", "1", "--minutes", "1e6"),
        *("--drafted", "2"),
    ),
    "benchmarks.cuda_trace": ("--context", "8"),
    "pytest": ("-n", "0", "--timeout", "0", "-p", "tools.rehearsal.left_out"),
}
#: Assumed of a card's machine. A kernel is compiled once, by one core; a graph is Inductor's, with its own kernels.
SECONDS = {"processes": 15.0, "kernels": 2.0, "graphs": 6.0, "captures": 0.1, "timings": 0.3, "tests": 1.5}
SHARE = 0.5  # of the cost model's speed that tokens are assumed to reach
_SMI = """#!/bin/sh
# Answers as nvidia-smi does that does not know: one value for each field, and no process.
case "$1" in --query-gpu=*) echo "$1" | sed 's/^[^=]*=//; s/[^,][^,]*/N\\/A/g' ;; esac
"""


def prepare(out: Path) -> None:
    """Have the commands of this process find an nvidia-smi and a file for their counts."""
    tools = out / "bin"
    tools.mkdir(parents=True, exist_ok=True)
    (tools / "nvidia-smi").write_text(_SMI)
    (tools / "nvidia-smi").chmod(0o755)
    os.environ["PATH"] = os.pathsep.join([str(tools.resolve()), os.environ["PATH"]])
    os.environ[COUNTS] = str(out / "counts.jsonl")
    for stale in (out / "counts.jsonl", out / "tuning.json"):
        stale.unlink(missing_ok=True)


def rehearsed(step: Step) -> Step:
    """Return a step whose commands run on no card."""
    commands = tuple(("-m", "tools.rehearsal", *command[1:], *SMALLER.get(command[1], ())) for command in step.commands)
    return step._replace(commands=commands, minutes=MINUTES)


def shortcomings(step: Step, out: Path) -> list[str]:
    """Return what failed in a rehearsed step that continued, by its files and its log."""
    log = (out / f"{step.name}.log").read_text(encoding="utf-8")
    found = [line for line in log.splitlines() if line.startswith("left out ")]
    found += [f"{a} of {b} kernels tuned" for a, b in re.findall(r"(\d+) of (\d+) kernels tuned", log) if a != b]
    for file in _files(step, out, ".json"):
        content = json.loads(file.read_text()) if file.exists() else {}
        rows = content.get("checks") or content.get("kernels") or content.get("models") or content.get("rows")
        found += [] if rows else [f"{file.name} has no rows"]
        if "kernels" in content:
            specs = model_kernels(MODELS[content["model"]])
            timed = {row["kernel"] for row in content["kernels"]} | {"exit score"}  # (whose bytes mean nothing)
            found += [f"{file.name} lacks {name}" for name in specs if name not in timed]
        found += [f"{file.name}: {row['error']}" for row in rows or () if "error" in row]
        for model in content.get("models", {}).values():
            found += [f"{file.name}: {name}: {why}" for name, why in model["missing"].items()]
    return found


def unrehearsed(step: Step, out: Path) -> list[str]:
    """Return why tests of a step were skipped, each reason with their number."""
    reasons = Counter(skip.get("message", "") for case in _tests(step, out) for skip in case.iter("skipped"))
    return [f"{count} {'test' if count == 1 else 'tests'}: {why}" for why, count in reasons.items()]


def _tests(step: Step, out: Path) -> Iterator[ET.Element]:
    for file in _files(step, out, ".xml"):
        yield from ET.parse(file).iter("testcase") if file.exists() else ()


def _files(step: Step, out: Path, ending: str) -> Iterator[Path]:
    """Return the files that a step's commands write."""
    for command in step.commands:
        yield from (Path(part.replace("{out}", str(out))) for part in command if part.endswith(ending))


def terms(step: Step, out: Path, known: set[str]) -> dict[str, float]:
    """Return the seconds that a step is estimated to take on a card, by term.

    Args:
        step: as a card runs it.
        out: the folder of the rehearsal's results; its counts are taken, so each step needs its own call.
        known: sources of kernels that earlier steps have compiled; this one's are added.
    """
    file = Path(os.environ[COUNTS])
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    new = {name for process in done for name in process["kernels"]} - known
    known |= new
    processes = max(1, *(int(c[c.index("-n") + 1]) for c in step.commands if "-n" in c), 1)  # side by side
    seconds = {"processes": SECONDS["processes"] * len(done), "kernels": SECONDS["kernels"] * len(new) / processes}
    for what in ("graphs", "captures", "timings"):
        seconds[what] = SECONDS[what] * sum(process.get(what, 0) for process in done) / processes
    seconds["tests"] = SECONDS["tests"] * sum(1 for _ in _tests(step, out)) / processes
    budgets = [float(c[c.index("--budget") + 1]) for c in step.commands if "--budget" in c]
    if budgets:  # (which stops what is compiled and timed)
        seconds |= {"kernels": 0.0, "timings": 0.0, "budgets": sum(budgets)}
    seconds["tokens"] = sum(map(token_seconds, (c for c in step.commands if c[1] == "benchmarks.decode")))
    return {term: value for term, value in seconds.items() if value}


def token_seconds(command: Sequence[str]) -> float:
    """Return the seconds of all tokens that a command of `benchmarks.decode` decodes, by the cost model."""
    options = decode._parse([*command[2:]])
    total = 0.0
    for name in options.random:
        roofline = Roofline(name, options.context, options.group_size)
        for row in rows_of(options):
            if row.command == "exact":  # Two texts without drafts, six with; it is assumed that none holds.
                plain, cycle = (exact_cycle(roofline, 0, "dense", "dense", n) for n in (0, row.job["drafted"]))
                total += options.new_tokens * (2 * plain["seconds"] + 6 * cycle["seconds"]) / SHARE
                continue
            # Warm up, three rounds, two passes over compared tokens; `generate` twice for each of two caches.
            tokens = 64 + 3 * options.new_tokens + 2 * 16
            tokens += 4 * options.new_tokens if row.job.get("generates", True) else 0
            total += tokens * roofline.seconds(row.job["depth"]) / SHARE
    return total
