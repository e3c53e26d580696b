"""The rehearsal of `make gpu`: what the stand-in for a card does as a card would, and that every step runs on it.

A process that has the card keeps it, so what asks for one runs in its own process.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from tests.support.layout import ROOT, run_python
from tools.rehearsal import left_out

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has a card of its own")

#: Runs every block of the text that `CARD` holds, in one process.
CARD = """
import torch
from tools.rehearsal import card
card.install()

def refused(work, *, says):
    try:
        work()
    except (RuntimeError, ValueError) as error:
        assert says in str(error), error
    else:
        raise AssertionError(f"not refused: {says}")

def captured(work):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph, made

# Tensors are the card's, whatever made them.
x = torch.arange(6, device="cuda").float()
assert x.is_cuda and str(x.device) == "cuda:0" and torch.ones(2).cuda().is_cuda and not x.cpu().is_cuda
view = x.view(2, 3)[:, 1:]
view += 10
assert x.tolist() == [0, 11, 12, 3, 14, 15]  # (a view shares its memory)
assert torch.isfinite(x).all() and (x.abs() != 0).sum().item() == 5
assert (x.to(torch.uint8)[1:] & 9).tolist() == [9, 8, 1, 8, 9]
drawn = [torch.randn(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda") for _ in range(2)]
assert torch.equal(*drawn) and drawn[0].is_cuda

# Both devices in one operator are refused, but for copies, scalars and indices.
refused(lambda: x + torch.ones(6), says="same device")
refused(lambda: torch.mv(torch.ones(1, 6), x), says="same device")
assert (x + torch.tensor(1.0))[torch.tensor([0])].item() == 1

# A capture runs nothing; a replay does, on the values that are there by then, in the same memory.
graph, made = captured(lambda: x.add_(1).sum() * 2)
assert x[0].item() == 0
x.fill_(2)
graph.replay()
graph.replay()
assert x[0].item() == 4 and made.item() == 48
for wait, says in (
    (lambda: x[0].item(), "_local_scalar_dense"),
    (lambda: x.cpu(), "not pinned"),
    (lambda: torch.empty(6, pin_memory=True).copy_(x), "not pinned"),
    (torch.cuda.synchronize, "waits for the device"),
    (lambda: graph.replay(), "replayed"),
):
    refused(lambda wait=wait: captured(wait), says=says)
flag = torch.zeros(6, pin_memory=True)
captured(lambda: flag.copy_(x, non_blocking=True))[0].replay()
assert flag.tolist() == [4] * 6

# Time is a count of what ran.
start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
start.record()
x.add_(1).mul_(2)
stop.record()
assert abs(start.elapsed_time(stop) - 2e3 * card.SECONDS) < 1e-9
refused(lambda: start.elapsed_time(torch.cuda.Event()), says="enable_timing")

# Memory is counted, and streams are torch's.
before = torch.cuda.memory_allocated()
held = torch.empty(1000, device="cuda")
assert torch.cuda.memory_allocated() == before + 4000 <= torch.cuda.max_memory_allocated()
held.record_stream(torch.cuda.Stream())
del held
assert torch.cuda.memory_allocated() == before

# Generated kernels run where a compiled one would, and only on the card's tensors.
from river_compile.kernels.triton.cache import ExitScoreSpec
from river_compile.kernels.triton.loader import load
kernel = load(ExitScoreSpec(1, 64, "bfloat16"), interpret=False)
row = torch.full((1, 64), 1.001, device="cuda").bfloat16()
buffers = {"update": row / 512, "residual": row, "previous": row, "hidden": torch.empty_like(row)}
score = torch.empty(1, device="cuda")
graph, _ = captured(lambda: kernel(**buffers, score=score.fill_(0)))
assert score.item() != 1
graph.replay()
assert abs(score.item() - 1) < 1e-3
assert torch.equal(buffers["hidden"], row + row / 512)  # (rounded, not cut off)
refused(lambda: kernel(**{name: t.cpu() for name, t in buffers.items()}, score=score.cpu()), says="a GPU")
"""


def test_the_card_does_what_a_card_does():
    run_python(CARD, ROOT, ROOT)


@pytest.mark.slow
def test_what_is_left_out_is_there():
    """A name that matches no test any more would leave out nothing, or hide that another one is left out."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-n", "0"]
    command += ["tests/kernels", "tests/runtime", "tests/api", "tests/lowering"]
    found = subprocess.run([*command, "-o", "addopts="], cwd=ROOT, capture_output=True, text=True).stdout
    for name in left_out.LEFT_OUT:
        assert re.search(name, found), name


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_programs_of_a_card_run_without_one(tmp_path):
    """Kernels are timed, and every kind of a text's steps is captured; `make gpu REHEARSE=1` runs the tests too."""
    model = str(tmp_path / "model")
    how = ("--device", "cuda", "--one-process", "--kinds", "chat", "--rows", "no_draft", "exact", "--json")
    for command in (
        ("tools.kernels.tune", "--model", "llama-3.2-1b"),
        ("benchmarks.kernels", "--model", "llama-3.2-1b", "--json", str(tmp_path / "kernels.json")),
        ("benchmarks.random_llama", "llama-3.2-1b", model, "--device", "cuda"),
        ("benchmarks.decode", "--model", model, *how, str(tmp_path / "decode.json")),
    ):
        environment = {**os.environ, "RIVER_COMPILE_TUNING": str(tmp_path / "tuning.json")}
        subprocess.run([sys.executable, "-m", "tools.rehearsal", *command], cwd=ROOT, env=environment, check=True)
    assert len(json.loads((tmp_path / "kernels.json").read_text())["kernels"]) == 6
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert rows["no_draft"]["captures"] > 0
    assert rows["exact"]["same_text"] == 1
