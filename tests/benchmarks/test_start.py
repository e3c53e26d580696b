"""What the benchmark of a start counts: its peak of private memory, and the times of its calls."""

from __future__ import annotations

import importlib.util
import time

import pytest
import torch

from benchmarks import memory, prefixes, processors, start

MIB = 2**20


def test_the_peak_is_the_most_that_was_held_at_a_time():
    with memory.Peak() as peak:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.1)
        del held
        time.sleep(0.1)
        now = memory.of_process()["anonymous"]
    assert peak.bytes >= 64 * MIB
    assert peak.bytes - now > 48 * MIB


def test_a_start_is_what_the_first_calls_take_longer_than_the_last():
    found = start._seconds([(1.0, 2.0, 5.0), (0.1, 0.2, 1.5), (0.1, 0.2, 1.0)])
    assert found == {"first_token_s": 1.0, "second_token_s": 2.0, "start_s": 4.5}


def test_every_processor_that_river_applies_itself_is_in_the_table(capsys):
    assert processors.main(["--vocabularies", "1000", "--repeats", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    ours = {line[0] for line in lines if line[-1] != "-"}
    assert ours == {kind.__name__ for kind in processors.BARRED} | {"MaxLengthCriteria", "EosTokenCriteria"}


@pytest.mark.parametrize("benchmark", [start, prefixes])
def test_without_llama_cpp_its_row_is_left_out_with_the_reason(benchmark, tmp_path, monkeypatch, capsys):
    """Rows of nothing but llama.cpp: the command still ends well."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    benchmark.main(["--model", str(tmp_path), "--rows", "llama_cpp"])
    assert "llama_cpp is left out: llama-cpp-python is not installed" in capsys.readouterr().err
