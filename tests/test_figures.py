"""Marked tables of README.md and docs/ are what ``python -m tools.figures`` writes from benchmarks/results."""

from __future__ import annotations

import json

import pytest

from river_compile.reporting import predict
from tools import figures, machines, records
from tools.marked import ROOT, filled, pages
from tools.records import RESULTS


@pytest.mark.core
@pytest.mark.parametrize("page", pages("figures"), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_documents_have_the_recorded_numbers(page):
    """``python -m tools.figures`` changes nothing."""
    assert filled(page, "figures", figures.content) == page.read_text(encoding="utf-8")


SIZES = {
    "parameters": 1_100_000_000, "blocks": 10, "blocks_bytes": 1_600_000_000, "twins_bytes": 450_000_000,
    "head_bytes": 400_000_000,
}  # fmt: skip


def test_predictions_are_bytes_by_bandwidth_times_a_measured_efficiency():
    sizes = predict.Sizes(1_100_000_000, 10, 1.6e9, 0.45e9, 0.4e9)
    reads = predict.bytes_per_token(sizes)
    assert reads["plain"] == 2e9
    assert reads["exact"] == pytest.approx((1.5e9 + 3 * 0.5625e9) / 3.3)
    assert reads["fast"] == pytest.approx(0.2 * 1.2e9 + 0.8 * 0.45e9 + 0.1125e9)
    assert reads["all_4bit"] == pytest.approx(0.5625e9)
    assert predict.memory_bytes(sizes) == pytest.approx(1.5e9 + 0.5625e9 + 0.2e9)
    assert predict.disk_bytes(sizes) == pytest.approx(1.5e9 + 0.5625e9)
    speeds = predict.tokens_per_s(reads, 20e9)
    assert speeds == {name: pytest.approx(predict.EFFICIENCY[name] * 20e9 / count) for name, count in reads.items()}
    half = predict.Sizes(1_100_000_000, 10, 1.6e9, 0.45e9, 0.4e9, "float16")  # not packed in 12 bits
    assert predict.bytes_per_token(half)["exact"] == pytest.approx((2e9 + 3 * 0.5625e9) / 3.3)
    assert predict.memory_bytes(half) == pytest.approx(2e9 + 0.5625e9 + 0.2e9)
    assert predict.disk_bytes(half) == pytest.approx(0.5625e9)
    full = predict.Sizes(1_100_000_000, 10, 3.2e9, 0.45e9, 0.8e9, "float32")
    assert predict.bytes_per_token(full)["all_4bit"] == pytest.approx(0.5625e9)
    assert predict.memory_bytes(full) == pytest.approx(4e9 + 0.5625e9 + 0.4e9)
    idle = {"inactive": 3.2e9, "inactive_twins": 0.9e9}
    mixture = predict.Sizes(2_700_000_000, 10, 1.6e9, 0.45e9, 0.4e9, **idle, merged=3.6e9)
    assert predict.bytes_per_token(mixture) == reads  # of the chosen experts
    assert predict.disk_bytes(mixture) == pytest.approx(predict.disk_bytes(sizes) + 0.75 * 3.2e9 + 0.9e9)
    assert predict.memory_bytes(mixture) == pytest.approx(predict.disk_bytes(mixture) + 0.2e9 + 3.6e9)
    half = predict.Sizes(2_700_000_000, 10, 1.6e9, 0.45e9, 0.4e9, "float16", **idle, merged=3.6e9)
    assert predict.memory_bytes(half) == pytest.approx(5.4e9 + 0.5625e9 + 0.9e9)  # read as loaded, and counted once
    records = [{"row": "a", "key": key, "value": value} for key, value in SIZES.items()]
    (row,) = machines.table(records).splitlines()[2:]
    parts = f"{speeds['plain']:.1f} / {speeds['exact']:.0f} / {speeds['fast']:.0f}"
    sizes = "2.3 | 5.5 | 2.1"  # memory, and with the 16-bit file and 1 GB; disk
    assert row.startswith(f"| a | 1.1B | {sizes} | {parts} | ")


def test_efficiencies_are_means_over_all_recorded_machines():
    """Those that `river check` predicts with; a new record that moves one changes the constant."""
    reads = machines.sizes_of(figures.runs_of(RESULTS / "reads.jsonl", "shapes")[-1])
    found = machines.efficiencies(reads, records.read(RESULTS / "decode.jsonl"))
    assert {name: round(share, 2) for name, share in found.items()} == predict.EFFICIENCY


def test_long_prompts_have_a_cell_for_each_model_and_context(tmp_path):
    """A program that one of the models lacks has a dash there."""
    machine = {"cpu": "a", "threads": 2, "instruction_set": "avx2", "torch": "2.13.0", "bandwidth_bytes_per_s": 3e10}
    fields = {"batch": 1, "new_tokens": 64, "repeats": 1, "machine": machine, "commit": "c", "command": "d"}
    values = [("small", "exact", 600, 38.1), ("small", "llama_cpp_q4_0", 265, 37.8), ("large", "exact", 270, 13.7)]
    lines = [
        {**fields, "model": model, "row": f"{row}/4096/all", "key": key, "value": value, "date": "2026-12-03T00:00:00"}
        for model, row, *speeds in values
        for key, value in zip(("prompt_tokens_per_s", "tokens_per_s"), speeds, strict=True)
    ]
    (tmp_path / "contexts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, _, *rows = figures.content("long small large", tmp_path).splitlines()
    assert head == "| tokens/s: prompt, then decode | small, 4,096 | large, 4,096 |"
    assert rows[:2] == [
        "| llama.cpp, Q4_0 | 265, 37.8 | – |",
        '| **River, default (`quality="exact"`)** | 600, **38.1** | 270, **13.7** |',
    ]
