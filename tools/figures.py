"""Fills the tables of measured numbers in README.md and docs/ from `benchmarks/results`: ``python -m tools.figures``.

They stand between ``<!-- figures: NAME ... -->`` and ``<!-- end of figures -->``. "decode MODEL ... on ISA" has a
column for each model, from its last run on a machine of an instruction set (any without "on"). "start MODEL ... on ISA"
has a row for each process of such a run, "machines" predicts tokens/s by memory bandwidth, and "checks" has each
measurement next to its prediction.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import records
from tools import machines
from tools.demo_models import MODELS
from tools.marked import filled, pages

Record = dict[str, Any]
Run = list[Record]  # of one date
BF16, BY_4_BITS = "16-bit weights", "4-bit weights"
# By row of `benchmarks.decode`: the program, and the weights that its output comes from.
PROGRAMS = {
    "eager": ("transformers, eager", BF16),
    "inductor": ("transformers, `torch.compile` (Inductor)", BF16),
    "llama_cpp_bf16": ("llama.cpp, bf16 file", BF16),
    "llama_cpp": ("llama.cpp, 4-bit file", BY_4_BITS),
    "openvino": ("OpenVINO, 16-bit", BF16),
    "openvino_4bit": ("OpenVINO, 4-bit file", BY_4_BITS),
    "no_draft": ("River, speculation off", BF16),
    "exact": ('**River, default (`quality="exact"`)**', BF16),
    "fast": ('River, `quality="fast"`', "2 layers in 16 bits, then 4-bit"),
    "all_4bit": ("River, all layers in 4 bits (`exit_depth=0`)", BY_4_BITS),
}
# By row of `benchmarks.start`: what started.
STARTS = {
    "plain": "transformers",
    "exact": "River, first start",
    "exact, again": "River, later start",
    "fast": 'River, `quality="fast"`, first start',
    "fast, again": 'River, `quality="fast"`, later start',
    "llama_cpp": "llama.cpp, 4-bit file",
}
_VERSIONS = ("torch", "transformers", "llama-cpp-python", "openvino-genai")
_KEY = "decode_tokens_per_s"


def content(arguments: str, results: Path = records.RESULTS) -> str:
    """Return the table of a mark's arguments.

    Raises:
        ValueError: no such table, or no record of what it shows.
    """
    what, _, isa = arguments.partition(" on ")
    name, *models = what.split()
    tables = {"decode": decode_table, "start": start_table}
    if name in tables:
        return tables[name]({model: runs_of(results / f"{name}.jsonl", model, isa) for model in models})
    if name in ("machines", "checks"):
        reads = runs_of(results / "reads.jsonl", "shapes")[-1]
        return (
            machines.checks(reads, records.read(results / "decode.jsonl"))
            if name == "checks"
            else machines.table(reads)
        )
    raise ValueError(f"figures: {arguments}: there is no table {name!r}; use decode, start, machines or checks")


def runs_of(path: Path, model: str, isa: str = "") -> list[Run]:
    """Return a model's runs in a file, oldest first, of all machines or those of an instruction set.

    Raises:
        ValueError: there is none.
    """
    runs: dict[str, Run] = {}
    for record in records.read(path) if path.exists() else []:
        if record["model"] == model and isa in ("", record["machine"]["instruction_set"]):
            runs.setdefault(record["date"], []).append(record)
    if not runs:
        where = f" on {isa}" if isa else ""
        raise ValueError(f"{path} has no record of {model}{where}; measure it with --record {path.stem}")
    return [runs[date] for date in sorted(runs)]


def decode_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of decode speeds with a row for each of `PROGRAMS`, and where its numbers come from.

    A number that a model's last run lacks is the one of an earlier run, which a footnote names.
    """
    lines = [
        f"| decode tokens/s | output comes from | {' | '.join(map(_title, runs))} |",
        f"|---|---|{'---:|' * len(runs)}",
    ]
    notes: list[str] = []
    for row, (program, weights) in PROGRAMS.items():
        cells = []
        for last, *earlier in (of_model[::-1] for of_model in runs.values()):
            run = next((run for run in (last, *earlier) if row in _speeds(run)), last)
            cells.append(_cell(_speeds(run).get(row), row == "exact") + ("" if run is last else "¹"))
            notes += [] if run is last else [_footnote(row, run)]
        lines.append(f"| {program} | {weights} | {' | '.join(cells)} |")
    what = "Batch {batch}, {new_tokens} tokens, prefill excluded, medians of {repeats} repeats."
    notes += ["–: not measured."] if any("–" in line for line in lines) else []
    return "\n".join([*lines, "", " ".join([*_sources(what, runs), *notes])]) + "\n"


def _speeds(run: Run) -> dict[str, float]:
    return {record["row"]: record["value"] for record in run if record["key"] == _KEY}


def _footnote(row: str, run: Run) -> str:
    """Return where a row of an earlier run comes from, with the row before it of the same weights for comparison."""
    speeds, weights = _speeds(run), PROGRAMS[row][1]
    before = [other for other in itertools.takewhile(lambda other: other != row, PROGRAMS) if other in speeds]
    compared = [f"{PROGRAMS[o][0]}: {_cell(speeds[o])} there" for o in before if PROGRAMS[o][1] == weights]
    return f"¹ Another run, {'; '.join([_command(run), *compared[-1:]])}."


def start_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of starts with a row for each of `STARTS` that a model's last run has, and their origin."""
    lines = ["| model | program | first token, s | full speed after, s | memory, GB |", "|---|---|---:|---:|---:|"]
    for model, of_model in runs.items():
        found = {(record["row"], record["key"]): record["value"] for record in of_model[-1]}
        for row, program in STARTS.items():
            if (row, "first_token_s") in found:
                full = found.get((row, "ready_s"), found[row, "second_token_s"])
                own = found.get((row, "own_bytes"))
                cells = [_cell(found[row, "first_token_s"]), _cell(full), _cell(own and own / 1e9)]
                lines.append(f"| {' | '.join([_title(model), program, *cells])} |")
    what = (
        "Seconds count from the call of `generate`, the model's weights being loaded. *Memory* is the most at a time "
        "that no file backs; mapped weights are not in it."
    )
    return "\n".join([*lines, "", " ".join(_sources(what, runs))]) + "\n"


def _title(model: str) -> str:
    return MODELS[model].title if model in MODELS else model


def _sources(what: str, runs: dict[str, list[Run]]) -> list[str]:
    """Return one sentence for each setting, with the commands that measured it; `what` has fields of records."""
    commands: dict[str, list[str]] = {}
    for *_, last in runs.values():
        commands.setdefault(f"{what.format(**last[0])} {_setting(last[0])}", []).append(_command(last))
    return [f"{setting}: {', '.join(measured)}." for setting, measured in commands.items()]


def _command(run: Run) -> str:
    record, speed = run[0], run[0]["machine"]["bandwidth_bytes_per_s"] / 1e9
    return f"`{record['command']}` (commit {record['commit']}, memory at {speed:.0f} GB/s)"


def _setting(record: Record) -> str:
    machine = record["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in _VERSIONS if machine.get(name))
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, "
        f"{record['date'][:10]}; {versions}"
    )


def _cell(value: float | None, bold: bool = False) -> str:
    if value is None:
        return "–"
    text = f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
    return f"**{text}**" if bold else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    argparse.ArgumentParser(description="Writes the tables of measured numbers.").parse_args(arguments)
    try:
        texts = {page: filled(page, "figures", content) for page in pages("figures")}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
