"""Decode steps on tapes of C++ calls are the uncaptured steps, to the bit, whatever the order of depths and caches.

The backbone runs operator by operator, which needs no compiler and leaves it uncaptured; its twins are C++ kernels.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

import river_compile
from river_compile import report
from river_compile.backend import river
from river_compile.exits import forced_threshold
from river_compile.kernels.native import load as native
from river_compile.kernels.native.cores import Cores
from river_compile.passes.program import Lowering
from river_compile.runtime.captures import CaptureLog
from tests.support.decoding import cache_state, decode, new_cache
from tests.support.families import make
from tests.support.traced import TracedStep

LAYERS = 3
OPTIONS = {"quantizer": "rtn", "group_size": 32, "first_exit": 1}
NATIVE = Lowering("eager", "native", fuse=True)
FORCED = [0, 0, 0, 1, 1, 2, 1, 0]  # a unit is captured when its inputs come a second time, and replayed from then on
CHOSEN = [None] * len(FORCED)


class Pair:
    """A model whose decode steps are captured, and the same one without captures."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, **options) -> None:
        self.models = []
        for captured in (None, False):
            model = make(name, layers=LAYERS, dtype=dtype)
            settings = {**OPTIONS, "kernels": NATIVE, **options, "graphs": captured}
            model.compile(backend=river, options=settings)
            self.models.append(model)
        self.kept = [[], []]

    def caches(self) -> list:
        """Returns a cache for each model, which stays alive, so that no later one lies where it lay."""
        for model, kept in zip(self.models, self.kept, strict=True):
            kept.append(new_cache(model, "full"))
        return [kept[-1] for kept in self.kept]

    def check(self, depths: list, batch: int = 1, threshold: float | None = None, caches: list | None = None) -> set:
        """Decodes with both models and compares logits, cache entries and depths; returns the depths."""
        found = []
        for model, cache in zip(self.models, caches or self.caches(), strict=True):
            forced = contextlib.nullcontext() if threshold is None else forced_threshold(threshold)
            with forced, river_compile.trace() as seen:
                logits = decode(model, cache, depths, batch, whole_mask=True)
            found.append((logits, [tensor for layer in cache_state(cache) for tensor in layer], seen))
        (logits, entries, seen), (plain_logits, plain_entries, plain_seen) = found
        for step, (a, b) in enumerate(zip(logits, plain_logits, strict=True)):
            assert torch.equal(a, b), f"logits of step {step}"
        for a, b in zip(entries, plain_entries, strict=True):
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), "cache entries or lengths"
        assert [s.depth for s in seen.tokens] == [s.depth for s in plain_seen.tokens]
        return {s.depth for s in seen.tokens}

    @property
    def log(self) -> CaptureLog:
        """What the report knows of the captures of the newest decode graph."""
        return [g for g in report(self.models[0]).graphs if g.kind == "decode"][-1].captures


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("name", "dtype", "batch"), [("llama", torch.bfloat16, 1), ("qwen3", torch.float32, 2)])
@pytest.mark.slow
def test_replays_are_the_uncaptured_steps(name, dtype, batch):
    """Forced depths, exits by threshold, caches one after the other and again, another number of threads."""
    torch.set_num_threads(1)
    pair = Pair(name, dtype)
    first, second = pair.caches(), pair.caches()
    assert pair.check(FORCED, batch, caches=first) == {0, 1, 2}
    assert pair.log.device == "tapes of C++ calls"
    assert {"tail 0", "tail 1"} <= {c.unit for c in pair.log.captures}
    assert "by tapes of C++ calls" in str(report(pair.models[0]))
    assert report(pair.models[1]).graphs[-1].captures.not_captured == "graphs=False"
    assert pair.check(CHOSEN, batch, threshold=-1.0, caches=second) == {1}
    assert pair.check(CHOSEN, batch, threshold=2.0) == {LAYERS}
    pair.check(CHOSEN, batch, threshold=0.9)
    made = pair.log.made
    for threads in (1, 2):
        for cache in first:
            cache.reset()
        torch.set_num_threads(threads)
        pair.check([0, 1, 0, 1], batch, caches=first)
        assert threads > 1 or pair.log.made == made, "captures of a cache outlive steps on others"


@pytest.mark.parametrize(("name", "uncaptured"), [("gpt_neox", {"twins 0"}), ("gemma2", {"head"})])
@pytest.mark.slow
def test_what_is_more_than_kernels_runs_uncaptured_and_says_so(name, uncaptured):
    """Keys that lie apart in their product are no kernel's; twins are, with a head with a soft cap."""
    pair = Pair(name)
    pair.check(FORCED)
    said = pair.log.uncaptured_units
    assert uncaptured <= said.keys()
    assert all("it is not made of C++ kernels alone" in said[unit] for unit in uncaptured)
    assert ("twins 0" in {c.unit for c in pair.log.captures}) == (uncaptured == {"head"})
    pair.check(CHOSEN, batch=2, threshold=-1.0)


def test_the_report_says_which_cores_the_kernels_leave_out(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    step = TracedStep()
    step.run(depth=1, quantizer="rtn")
    native.load()
    monkeypatch.setattr("river_compile.kernels.native.cores.cores", lambda: Cores(8, 3))
    torch.set_num_threads(8)
    found = report(step.model)
    assert found.to_dict()["threads"] == 3
    assert "threads        3 on the fast cores of 8, where PyTorch has 8 threads" in str(found)
    torch.set_num_threads(7)
    assert report(step.model).to_dict()["threads"] == 7
    assert "fast cores" not in str(report(step.model))
