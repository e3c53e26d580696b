"""What backbone offloading saves and costs on this machine: a model in memory, and with blocks offloaded.

    python -m benchmarks.offload                                # SmolLM2, offload=4
    python -m benchmarks.offload --model DIR --offload 2 8 --json offload.json

Every row is its own process, which generates one text three times, the last one measured: with both policies, with no
exit ("never", the plain text, all blocks streamed for every token) and in exact mode. "Resident" is what stays in
memory of weights and packed twins; "MB in" are weights that came in. "Same text" compares with the row "never".
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks import common
from river_compile.cli import shared
from tools import demo_models

_NEVER = 2.0  # above every cosine
_FIRST_EXIT = 2  # the option's default

PROMPT = "Write a Python function that returns the n-th Fibonacci number."


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parse(arguments)
    if options.worker:
        common.serve({"measure": measure})
        return 0
    rows = common.attempted(_measure, options)
    if rows is None:
        return 1
    outcome = {**common.setting("offload", options), "rows": rows}
    show(outcome)
    common.write_outcome(outcome, options.json)
    return 0


def _measure(options: argparse.Namespace) -> dict[str, dict]:
    folder = demo_models.resolve(options.model)
    rows = _rows(options.offload, options.threshold)
    return {name: _measured(name, fields, folder, options) for name, fields in rows.items()}


def measure(folder: str, dtype: str, options: dict, new_tokens: int, threads: int, exact: bool) -> dict:
    """Measure one row, inside its process."""
    import torch

    import river_compile
    from river_compile.decoding import mode
    from river_compile.reporting.timing import generate

    shared.quiet()
    torch.set_num_threads(threads)
    model, tokenizer = demo_models.load(folder, dtype)
    ids = shared.encode(tokenizer, PROMPT)
    model.compile(backend="river", options=options)
    how = {"custom_generate": mode.exact} if exact else {}
    for _ in range(2):
        generate(model, ids, new_tokens, **how)
    before = _brought_in(river_compile.report(model))
    timed = generate(model, ids, new_tokens, **how)
    report = river_compile.report(model)
    moved = (report.to_dict().get("offloaded") or {}).get("moved", 0)
    weights = sum(p.nbytes for p in model.parameters()) + sum(p.nbytes for p in report.packed)
    return {
        "weights_bytes": weights,
        "resident_bytes": weights - moved,
        "process_bytes": resident_bytes(),
        "prompt_s": timed.first_token_s,
        "decode_tokens_per_s": timed.decode_tokens_per_s,
        "mean_depth": report.mean_depth,
        "brought_in_bytes_per_token": (_brought_in(report) - before) / len(timed.tokens),
        "tokens": list(timed.tokens),
    }


def _brought_in(report: Any) -> int:
    """Return the bytes of weights that had come in by a report."""
    return (report.to_dict().get("offloaded") or {}).get("brought_in", 0)


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS:"))


def show(outcome: dict) -> None:
    """Print the table."""
    common.print_setting(outcome)
    headers = ["", "weights MB", "resident MB", "share", "process MB", "prompt ms", "decode tokens/s", "mean depth"]
    headers += ["MB in per token", "same text"]
    rows = []
    for name, row in outcome["rows"].items():
        weights, resident, process = (row[f"{key}_bytes"] / 1e6 for key in ("weights", "resident", "process"))
        share = f"{resident / weights:.0%}"
        rows.append([name, round(weights, 1), round(resident, 1), share, round(process), row["prompt_s"] * 1e3])
        never = outcome["rows"].get(f"{name.partition(', ')[0]}, never")
        same = "" if never is None else "yes" if row["tokens"] == never["tokens"] else "no"
        rows[-1] += [row["decode_tokens_per_s"], row["mean_depth"], row["brought_in_bytes_per_token"] / 1e6, same]
    common.print_table(headers, rows)


def _rows(depths: list[int], threshold: float) -> dict[str, dict]:
    """Return the options of the rows by their names."""
    usual = {"threshold": threshold}
    rows: dict[str, dict] = {"in memory": usual}
    for depth in depths:
        for policy in ("exit", "fetch") if depth >= _FIRST_EXIT else ("fetch",):  # ("exit" lets no token go before)
            rows[f"offload={depth}, {policy}"] = {**usual, "offload": depth, "offload_policy": policy}
        for name in ("never", "exact"):
            rows[f"offload={depth}, {name}"] = {"threshold": _NEVER, "offload": depth, "offload_policy": "fetch"}
    return rows


def _measured(name: str, fields: dict, folder: Path, options: argparse.Namespace) -> dict:
    job = {"folder": str(folder), "dtype": options.dtype, "new_tokens": options.new_tokens, "threads": options.threads}
    with closing(common.Worker("benchmarks.offload", name, options.threads)) as worker:
        return worker.ask("measure", options=fields, exact=name.endswith("exact"), **job)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common.command_line(__doc__, "model", "dtype", "new-tokens", "threads", "json", "worker", new_tokens=64)
    parser.add_argument("--offload", nargs="+", type=common.number(0), default=[4], help="blocks that stay (4)")
    parser.add_argument("--threshold", type=float, default=0.7, help="of the similarity criterion (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
