"""The rehearsal of `make gpu`: what the stand-in for a card does as a card would, what is noticed, what is estimated.

A process that has the card keeps it, so what asks for one runs in its own process.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.layout import ROOT, run_python
from tools import gpu, rehearsal
from tools.gpu import STEPS, Step
from tools.rehearsal import left_out

pytestmark = pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch has a card of its own")

#: Runs every block of the text that `CARD` holds, in one process.
CARD = """
import torch
from tools.rehearsal import card
card.install()
from torch.profiler import ProfilerActivity, profile

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

# Time is a count of what ran; a profile has it too.
start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
start.record()
x.add_(1).mul_(2)
stop.record()
assert abs(start.elapsed_time(stop) - 2e3 * card.SECONDS) < 1e-9
refused(lambda: start.elapsed_time(torch.cuda.Event()), says="enable_timing")
with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
    graph.replay()
    torch.cuda.synchronize()
names = [event.name for event in found.events()]
assert "cudaGraphLaunch" in names and "cudaDeviceSynchronize" in names
assert sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events()) == 3

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

# Torch's own 4-bit product, which no CPU has, computes its grid.
from benchmarks.int4_baseline import packed_for_cuda
from river_compile.kernels.quant.grid import quantize
grid = quantize(torch.randn(16, 256, device="cuda"), 64, "rtn")
weight, table = packed_for_cuda(grid)
y = torch.ops.aten._weight_int4pack_mm(torch.ones(1, 256, device="cuda").bfloat16(), weight, 64, table)
assert (y.float() - grid.dequantize().float().sum(1)).abs().max() < 0.5
"""


def test_the_card_does_what_a_card_does():
    run_python(CARD, ROOT, ROOT)


def test_rehearsed_commands_are_those_of_a_card_with_more_behind_them():
    for step in STEPS:
        other = rehearsal.rehearsed(step)
        assert other.name == step.name
        for command, real in zip(other.commands, step.commands, strict=True):
            assert command[:2] == ("-m", "tools.rehearsal")
            assert command[2 : len(real) + 1] == real[1:]


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setenv(rehearsal.COUNTS, str(tmp_path / "counts.jsonl"))
    return tmp_path


def written(out: Path, name: str, log: str = "", **files: object) -> Step:
    """A step that has written this."""
    (out / f"{name}.log").write_text(log)
    for file, content in files.items():
        (out / f"{file}.json").write_text(json.dumps(content))
    return Step(name, 5, "", (("-m", "some.module", *(f"{{out}}/{file}.json" for file in files)),))


@pytest.mark.parametrize(
    ("wrong", "content"),
    [
        ([], {"checks": [{}]}),
        (["made.json has no rows"], {"checks": []}),
        (["made.json: too deep"], {"rows": [{"levels": 1}, {"error": "too deep"}]}),
        (["made.json: river never: NaN"], {"models": {"a": {"missing": {"river never": "NaN"}}}}),
    ],
)
def test_what_a_program_notes_and_goes_on_is_a_failure(wrong, content, out):
    assert rehearsal.shortcomings(written(out, "step", made=content), out) == wrong


def test_kernels_that_are_missing_or_left_out_are_failures(out):
    timed = [{"kernel": "norm + q|k|v"}, {"kernel": "down + residual"}]
    step = written(out, "kernels", made={"model": "llama-3.2-1b", "kernels": timed})
    assert [line.partition("lacks ")[2] for line in rehearsal.shortcomings(step, out)] == [
        "rope + kv write + attention", "o + residual", "norm + gate|up", "norm + head",
    ]  # fmt: skip
    step = written(out, "tune", "left out w4 with a tile: no\n4 of 5 kernels tuned for sm_90\n5 of 5 kernels tuned\n")
    assert rehearsal.shortcomings(step, out) == ["left out w4 with a tile: no", "4 of 5 kernels tuned"]


def test_tests_that_were_left_out_are_named_and_count_on_a_card(out):
    skip = '<testcase name="a"><skipped message="no room" /></testcase>'
    (out / "some.xml").write_text(f"<suite>{skip}{skip}<testcase name='b' /></suite>")
    step = Step("some", 5, "", (("-m", "pytest", "--junitxml", "{out}/some.xml"),))
    assert rehearsal.unrehearsed(step, out) == ["2 tests: no room"]
    assert rehearsal.terms(step, out, set()) == {"tests": 3 * rehearsal.SECONDS["tests"]}


@pytest.mark.slow
def test_what_is_left_out_is_there():
    """A name that matches no test any more would leave out nothing, or hide that another one is left out."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-n", "0"]
    command += [
        part for step in STEPS for c in step.commands if "pytest" in c for part in c if part.startswith("tests/")
    ]
    found = subprocess.run([*command, "-o", "addopts="], cwd=ROOT, capture_output=True, text=True).stdout
    for name in left_out.LEFT_OUT:
        assert re.search(name, found), name


def test_a_step_is_estimated_from_what_it_did_and_from_what_its_arguments_say(out):
    seconds = rehearsal.SECONDS
    counts = [{"kernels": ["a", "b"], "graphs": 3}, {"kernels": ["b", "c"], "timings": 2}]
    Path(out / "counts.jsonl").write_text("\n".join(map(json.dumps, counts)))
    known = {"a"}
    step = Step("some", 5, "", (("-m", "some.module"), ("-m", "other", "--budget", "60")))
    assert rehearsal.terms(Step("none", 5, "", step.commands[:1]), out, known) == {
        "processes": 2 * seconds["processes"],
        "kernels": 2 * seconds["kernels"],  # of which "a" was compiled before
        "graphs": 3 * seconds["graphs"],
        "timings": 2 * seconds["timings"],
    }
    assert known == {"a", "b", "c"}
    assert rehearsal.terms(step, out, known) == {"budgets": 60.0}  # (the counts were taken)


def test_tokens_are_those_of_the_whole_model():
    small, large = (
        rehearsal.token_seconds(("-m", "benchmarks.decode", "--device", "cuda", "--random", name, "--only", "river"))
        for name in ("llama-3.2-1b", "llama-3.1-8b")
    )
    assert 1 < small < large / 3


def test_tokens_of_exact_mode_count():
    """None of the drafts is assumed to hold: longer ones take longer."""
    command = ("-m", "benchmarks.decode", "--device", "cuda", "--random", "llama-3.2-1b", "--only", "exact")
    assert 1 < rehearsal.token_seconds(command) < rehearsal.token_seconds((*command, "--drafted", "7"))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_step_of_a_card_runs_without_one(tmp_path, capfd):
    assert gpu.main(["--rehearse", "--out", str(tmp_path)]) == 0, capfd.readouterr().out
    done = json.loads((tmp_path / "steps.json").read_text())
    assert [(row["step"], row["state"]) for row in done] == [(step.name, "ok") for step in STEPS]
    assert all(sum(row["card_seconds"].values()) > 0 for row in done)
