"""Predicted tokens/s by memory bandwidth and model, and each measurement next to its prediction.

The bytes are those that `benchmarks.reads` recorded, the formulas those of `river check`.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from river_compile.reporting import predict
from river_compile.reporting.predict import ALL_4BIT, EXACT, FAST, PLAIN, Sizes, bytes_per_token, tokens_per_s

BANDWIDTHS = (20, 40, 80, 200, 400)  # GB/s
LARGEST = 500  # tokens/s, above which a token's fixed costs, which are not predicted, are most of its time
SHOWN = (PLAIN, EXACT, FAST)
_TORCH = 1e9  # bytes of torch, transformers and a short KV cache
_ROWS = {"eager": PLAIN, "exact": EXACT, "fast": FAST, "all_4bit": ALL_4BIT}  # of `benchmarks.decode`
_SHAPES = {  # of `benchmarks.reads`, by model
    "smollm2": "smollm2-135m",
    "smollm2-tuned": "smollm2-135m",
    "qwen-coder-0.5b": "qwen2.5-0.5b",
    "qwen-coder-1.5b": "qwen2.5-1.5b",
}
_SPEED = "decode_tokens_per_s"


def sizes_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Sizes]:
    """Return the sizes by shape of a run of `benchmarks.reads`."""
    rows: dict[str, dict[str, float]] = {}
    for record in records:
        rows.setdefault(record["row"], {})[record["key"]] = record["value"]
    return {
        name: Sizes(
            int(row["parameters"]), int(row["blocks"]), row["blocks_bytes"], row["twins_bytes"], row["head_bytes"]
        )
        for name, row in rows.items()
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of a run of `benchmarks.reads`."""
    heads = [
        "model",
        "parameters",
        "memory, GB",
        "first run at peak, GB",
        "disk, GB",
        *(f"{bandwidth} GB/s" for bandwidth in BANDWIDTHS),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name, sizes in sizes_of(records).items():
        sums = (predict.memory_bytes(sizes), peak_bytes(sizes), predict.disk_bytes(sizes))
        title = [name, f"{sizes.parameters / 1e9:.2g}B", *(_rounded(count / 1e9) for count in sums)]
        speeds = [tokens_per_s(bytes_per_token(sizes), gb * 1e9) for gb in BANDWIDTHS]
        cells = (" / ".join(_rate(speed[name]) for name in SHOWN) for speed in speeds)
        lines.append(f"| {' | '.join([*title, *cells])} |")
    return "\n".join(lines) + "\n"


def peak_bytes(sizes: Sizes) -> float:
    """Return the predicted resident bytes of a first run: the 16-bit file is mapped while its copies are made."""
    return 2 * sizes.parameters + predict.memory_bytes(sizes) + _TORCH


def checks(reads: Sequence[Mapping[str, Any]], speeds: Iterable[Mapping[str, Any]]) -> str:
    """Return the Markdown table of all measured speeds of `benchmarks.decode` next to the predicted ones."""
    heads = ["machine", "memory, GB/s", "model", *(f"{name}, predicted / measured" for name in SHOWN)]
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---|" + "---:|" * len(SHOWN)]
    runs = _runs(speeds)
    for (_, model), run in sorted(runs.items()):
        machine = next(iter(run.values()))["machine"]
        bandwidth = machine["bandwidth_bytes_per_s"]
        predicted = tokens_per_s(bytes_per_token(sizes_of(reads)[_SHAPES[model]]), bandwidth)
        found = {name: _rounded(record["value"]) for name, record in run.items()}
        cells = (f"{_rounded(predicted[name])} / {found.get(name, '–')}" for name in SHOWN)
        title = [f"{machine['cpu']}, {machine['instruction_set']}", f"{bandwidth / 1e9:.0f}", model]
        lines.append(f"| {' | '.join([*title, *cells])} |")
    return "\n".join(lines) + "\n"


def efficiencies(reads: Mapping[str, Sizes], speeds: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the geometric mean over all measured speeds of the share of the bandwidth that a token reaches."""
    shares: dict[str, list[float]] = {}
    for (_, model), run in _runs(speeds).items():
        counts = bytes_per_token(reads[_SHAPES[model]])
        for name, record in run.items():
            share = record["value"] * counts[name] / record["machine"]["bandwidth_bytes_per_s"]
            shares.setdefault(name, []).append(share)
    return {name: statistics.geometric_mean(found) for name, found in shares.items()}


def _runs(speeds: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Mapping[str, Any]]]:
    """Return the records that predictions are made for, by date and model, then by prediction."""
    runs: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for record in speeds:
        if record["model"] in _SHAPES and record["key"] == _SPEED and record["row"] in _ROWS:
            runs.setdefault((record["date"], record["model"]), {})[_ROWS[record["row"]]] = record
    return runs


def _rate(tokens: float) -> str:
    return f"{LARGEST}+" if tokens > LARGEST else _rounded(tokens)


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
