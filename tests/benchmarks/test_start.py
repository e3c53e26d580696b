"""What the benchmark of a start counts: its peak of private memory, and the times of its calls."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from benchmarks import common, memory, prompt_sets, start
from benchmarks.prompt_sets import Prompt

MIB = 2**20


def test_the_peak_is_the_most_that_was_held_at_a_time():
    with memory.Peak() as peak:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.1)
        del held
        time.sleep(0.1)
        with memory.Peak() as later:
            time.sleep(0.1)
    assert peak.bytes >= 64 * MIB
    assert peak.bytes - later.bytes > 48 * MIB


def test_a_start_is_what_early_calls_take_longer_than_later_ones_of_their_prompts():
    found = start._seconds([(0, (1.0, 2.0, 5.0)), (1, (0.1, 0.2, 3.5)), (0, (0.1, 0.2, 0.5))], [1.0, 3.0])
    assert found == {"first_token_s": 1.0, "second_token_s": 2.0, "start_s": 4.5}


def test_a_row_pays_from_the_tokens_that_make_up_for_its_start(monkeypatch, tmp_path, capsys):
    """1 s more to start, 0.1 s less a token; the disk and the build of the kernels have their numbers."""

    class Worker:
        def __init__(self, module, name, threads, caches=None):
            self.cache = (caches or {}).get("RIVER_COMPILE_CACHE_DIR")

        def ask(self, command, row="", **more):
            if command == "compile_kernels":
                return {"built": True, "build_s": 7.0, "disk_bytes": 3 << 20}
            step = 0.2 if row == "plain" else 0.1
            with open(f"{self.cache}/twins", "wb") as file:
                file.write(bytes(2 << 20))
            late = [(0, (1.0, 1.0 + step))] if row == "exact" else []
            early = [*late, (0, (0.0, step))][:1]
            memory = {"peak_rss_bytes": 1 << 20, "own_bytes": 1 << 20, "ready_s": 1.0}
            return {"early": early, "steady": [(0.0, step), (0.0, 2 * step)], **memory}

        def close(self):
            pass

    monkeypatch.setattr(common, "Worker", Worker)
    monkeypatch.setattr(prompt_sets, "encoded", lambda *_: [Prompt("chat", 32, [1]), Prompt("code", 32, [2])])
    (tmp_path / "config.json").write_text("{}")
    out = tmp_path / "out.json"
    assert start.main(["--model", str(tmp_path), "--rows", "plain", "exact", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    exact = rows["exact"]
    assert math.isclose(exact["tokens_per_s"], 7.5)  # of 10 and 5
    assert (exact["least_tokens_per_s"], exact["most_tokens_per_s"]) == (5.0, 10.0)
    assert exact["pays_from_tokens"] == pytest.approx(7.5)
    assert rows["exact, again"]["disk_bytes"] == 2 << 20
    assert rows[start.KERNELS] == {"build_s": 7.0, "disk_bytes": 3 << 20}
    page = capsys.readouterr().out
    assert "7.5 (5.0–10.0)" in page
    assert "took 7.0 s to build" in page


def test_without_llama_cpp_its_row_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    """Rows of nothing but llama.cpp: the command still ends well."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("RIVER_COMPILE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(start, "_compile", lambda *_: {})
    monkeypatch.setattr(prompt_sets, "encoded", lambda *_: [])
    start.main(["--model", str(tmp_path), "--rows", "llama_cpp"])
    assert "llama_cpp is left out: llama-cpp-python is not installed" in capsys.readouterr().err
