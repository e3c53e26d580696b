"""Records of measured numbers: what of an outcome they keep, and that a run again replaces them."""

from __future__ import annotations

import math

import pytest

from benchmarks import reads
from tools import figures, records


def outcome(rows, **machine):
    facts = {"cpu": "some", "threads": 2, "instruction_set": "avx2"} | machine
    setting = {"benchmark": "decode", "model": "smollm2", "dtype": "bfloat16", "repeats": 3}
    return {**setting, "machine": facts, "rows": rows, "ratios": {"a/b": 2.0}}


def test_every_number_and_word_of_an_outcome_is_a_record(tmp_path):
    """Numbers in lists, infinities, flags, empty words and what is outside of rows are none."""
    row = {"tokens_per_s": 4.5, "first_token_s": 1, "outside_ms": None, "fine": True, "by_repeat": [1.0], "build": ""}
    row["contexts"] = {"32": {"chat": {"tokens_per_s": 5.0}}}
    row["choice"] = "Q4_0"
    path = records.write(outcome({"a": row, "b": {"pays_from": math.inf}}), "some", "python x", tmp_path)
    found = records.read(path)
    assert [(r["row"], r["key"], r["value"], r["unit"]) for r in found] == [
        ("a", "tokens_per_s", 4.5, "tokens/s"),
        ("a", "first_token_s", 1, "s"),
        ("a/32/chat", "tokens_per_s", 5.0, "tokens/s"),
        ("a", "choice", "Q4_0", ""),
        ("ratios", "a/b", 2.0, ""),
    ]
    kept = {"benchmark": "decode", "model": "smollm2", "dtype": "bfloat16", "repeats": 3, "command": "python x"}
    assert found[0].items() >= kept.items()
    assert {"commit", "date", "machine"} < found[0].keys()


def test_a_run_again_replaces_the_records_of_its_command_on_its_machine(tmp_path):
    def values():
        return [record["value"] for record in records.read(tmp_path / "some.jsonl") if record["row"] == "a"]

    for value, command, machine in [(1, "x", {}), (2, "y", {}), (3, "x", {"threads": 4}), (4, "x", {})]:
        records.write(outcome({"a": {"s": value}}, **machine), "some", command, tmp_path)
    assert values() == [2, 3, 4]


def test_the_recorded_bytes_are_those_that_check_counts():
    """Of the smallest shape; docs/guides/machines.md predicts from them."""
    recorded = figures.runs_of(records.RESULTS / "reads.jsonl", "shapes")[-1]
    (name, *_) = reads.SHAPES
    assert {r["key"]: r["value"] for r in recorded if r["row"] == name} == reads.reads(name, "bfloat16")
    assert list(dict.fromkeys(r["row"] for r in recorded)) == list(reads.SHAPES)


def test_a_commit_is_named_with_its_changes(tmp_path, monkeypatch):
    said = {"rev-parse": "abc", "status": " M benchmarks/x.py"}
    monkeypatch.setattr(records, "_git", lambda what, *_: said[what])
    assert records.commit() == "abc with changes"
    said["status"] = ""
    assert records.commit() == "abc"
    monkeypatch.undo()
    monkeypatch.setattr(records, "ROOT", tmp_path)
    assert records.commit() == "unknown"


@pytest.mark.parametrize("name", figures.PROGRAMS)
def test_the_rows_of_the_readme_are_measured(name):
    from benchmarks.decode_rows import ROWS

    assert name in ROWS
