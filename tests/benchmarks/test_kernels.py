"""The benchmark script where there is no GPU: its message, and the arithmetic of its table."""

import json

import pytest
import torch

from benchmarks import cpu_experts, cpu_kernels, kernels
from tools.kernels.shapes import ModelShape


def test_table(capsys):
    timing = kernels.Timing("q|k|v", "6144 x 4096", 10e-6, 14_000_000, 25e-6, 9e-6)
    kernels.print_row(timing, copy=2e12)
    line = "| q\\|k\\|v | 6144 x 4096 | 10.0 | 7.0 | 9.0 | 1400 | 70% | 2.50 |"
    assert capsys.readouterr().out.splitlines()[-1] == line


@pytest.fixture
def card(monkeypatch):
    """Stand-ins for a card and for everything that is timed on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(kernels, "device_name", lambda index: "sm_90")
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda: 2e12)
    monkeypatch.setattr(kernels.common, "gpu_facts", lambda: {"gpu_state": "1"})


def test_a_kernel_that_fails_is_named_and_the_others_are_kept(card, monkeypatch, tmp_path, capsys):
    file, kept = tmp_path / "kernels.json", []

    def timing(label, spec):
        if file.exists():
            kept.append(len(json.loads(file.read_text())["kernels"]))
        if label == "o + residual":
            raise RuntimeError("out of resource: registers\nmore")
        return None if label == "exit score" else kernels.Timing(label, "1 x 1", 1e-6, 10**6)

    monkeypatch.setattr(kernels, "timing", timing)
    assert kernels.main(["--model", "smollm2-135m", "--json", str(file)]) == 1
    found = json.loads(file.read_text())
    assert found["facts"] == {"gpu_state": "1"}
    names = [row["kernel"] for row in found["kernels"]]
    assert names == ["norm + q|k|v", "rope + kv write + attention", "norm + gate|up", "down + residual", "norm + head"]
    assert kept == [1, 2, 2, 3, 4, 4]  # what was written before each of the later ones
    assert "o + residual: out of resource: registers\n" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")
def test_without_a_gpu_it_says_so(capsys):
    assert kernels.main([]) == 1
    assert "there is none here" in capsys.readouterr().err


def test_the_cpu_table_is_printed_from_given_timings(capsys):
    """Rate from the bytes and the least time, the part of the plain sum's rate, and four rows against one."""
    one = {"kernel": "native W4A8", "out_features": 64, "in_features": 32, "threads": 2, "bytes": 2_000_000}
    seconds = {1: 100e-6, 4: 110e-6, 8: 200e-6, 16: 400e-6}
    cpu_kernels.print_table(
        [cpu_kernels.CpuTiming(**one, rows=m, seconds=s, sum_seconds=90e-6) for m, s in seconds.items()]
    )
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "| native W4A8 | 64 x 32 | 2 | 100 | 110 | 200 | 400 | 20.0 | 90% | 1.10 |"


def test_kernels_are_timed_on_a_cpu(monkeypatch, tmp_path, capsys):
    """The whole command, on tiny shapes: every matmul at every number of rows with its bytes, and attention."""
    monkeypatch.setattr(cpu_kernels, "SHAPES", ((32, 64),))
    monkeypatch.setattr(cpu_kernels, "BYTES", 3 * (32 * 32 + 32 * 4))
    monkeypatch.setattr(cpu_kernels, "RUN_BYTES", 0)
    monkeypatch.setattr(cpu_kernels, "HEADS", ((4, 2, 16),))
    monkeypatch.setattr(cpu_kernels, "SLOTS", 32)
    file = tmp_path / "figures.json"
    assert kernels.main(["--device", "cpu", "--repeats", "2", "--threads", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["kernels"]
    assert len(found) == 4 * len(cpu_kernels.ROWS)
    in_4_bits, in_12_bits, in_16_bits = 32 * 32 + 32 * 4, 32 * 64 * 3 // 2, 32 * 64 * 2
    assert {row["bytes"] for row in found} == {in_4_bits, in_12_bits, in_16_bits}
    assert all(row["seconds"] > 0 and row["sum_seconds"] > 0 for row in found)
    assert capsys.readouterr().out.splitlines()[-1].startswith("| 4 x 16, 2 in the cache | 1 | ")


def test_the_table_of_experts(capsys, monkeypatch):
    """A call's rows choose two of four experts, no call the ones of another; 4 bits and 16 bits are both timed."""
    monkeypatch.setattr(cpu_experts, "SHAPE", ModelShape("tiny", 1, 64, 1, 1, 64, 64, 96, experts=4, chosen=2))
    assert [route.tolist() for route in cpu_experts.choices(2, 4, 2)] == [[0, 0, 1, 1], [2, 2, 3, 3]]
    assert cpu_experts.main(["--threads", "1", "--repeats", "2", "--tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    subjects = ("native W4A8", "grouped 16 bits")
    wanted = [(product, subject) for product in ("gate|up", "down") for subject in subjects]
    assert all(line.split()[0] == p and s in line for line, (p, s) in zip(lines, wanted, strict=True))
