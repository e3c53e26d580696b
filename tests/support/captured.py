"""A tiny model whose decode steps are captured, and the same steps uncaptured to compare with.

The recorder (recorder.py) stands in for CUDA graphs on a machine without a GPU; a test that uses this on a CPU
is inside `recording`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import strategies as st
from transformers import StaticCache

from river_compile import report
from river_compile.backend import executors_of, river
from river_compile.exits import forced_depth, forced_threshold
from river_compile.runtime.executor import RiverExecutor
from river_compile.runtime.state import StepState, on_step
from river_compile.upstream.transformers import full_static_cache
from tests.support.decoding import cache_argument, cache_state, run_plainly
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS, operators_on

LAYERS = 4
CAPACITY = 40
OPTIONS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def capturing(**options) -> dict[str, object]:
    return {**OPTIONS, "graphs": True, **options}


class Decoder:
    """A tiny compiled model that takes steps on caches it makes.

    The mask covers the whole cache, as generate makes it, so that no input changes its size. Families with sliding
    windows make their own masks.

    Args:
        name: of the model's family.
        compiled_prompts: prompts run through a separate graph too, which takes as long to trace as that of steps.
        layers: number of decoder blocks.
        options: of the backend, besides `OPTIONS`.
    """

    def __init__(
        self,
        name: str = "llama",
        device: str = "cpu",
        backend=river,
        compiled_prompts: bool = False,
        layers: int = LAYERS,
        **options,
    ) -> None:
        self.model = make(name, layers=layers).to(device)
        self.model.compile(backend=backend, options=capturing(**{"kernels": operators_on(device), **options}))
        self.device, self._compiled_prompts = device, compiled_prompts

    def start(self, seed: int = 0, capacity: int = CAPACITY, batch: int = 1) -> StaticCache:
        """Returns a new cache with a prompt of 6 tokens in it."""
        cache = full_static_cache(self.model, capacity)  # (ring buffers count in Python, so no step repeats)
        self._call(cache, prompt(6, batch, seed), 0)
        return cache

    def step(self, cache: StaticCache, token: int, depth: int | None = None, threshold: float | None = None):
        """Feeds a token and returns its logits: at a forced depth, with a forced threshold, or as compiled."""
        forced = contextlib.nullcontext()
        if depth is not None:
            forced = forced_depth(depth)
        elif threshold is not None:
            forced = forced_threshold(threshold)
        ids = torch.full((cache.layers[0].keys.shape[0], 1), token)
        with forced:
            return self._call(cache, ids, int(cache.get_seq_length()))

    @torch.no_grad()
    def _call(self, cache, ids, filled):
        slots = torch.arange(cache.get_max_length())
        position = torch.arange(filled, filled + ids.shape[1])
        mask = (slots[None, :] <= position[:, None])[None, None].expand(len(ids), 1, -1, -1)
        held = {"use_cache": True, cache_argument(self.model): cache}
        tensors = {"input_ids": ids, "position_ids": position[None]}
        if self.model.config.model_type == "llama":
            tensors["attention_mask"] = mask.contiguous()
        run = self.model if filled or self._compiled_prompts else functools.partial(run_plainly, self.model)
        return run(**{k: v.to(self.device) for k, v in tensors.items()}, **held).logits

    @property
    def executor(self) -> RiverExecutor:
        """Of the newest captured graph."""
        return captured(self.model)[-1]

    @property
    def state(self) -> StepState:
        """The newest one of it."""
        return self.executor.states()[-1]

    @property
    def log(self):
        """What the report knows of the captures of the newest decode graph."""
        return [g for g in report(self.model).graphs if g.kind == "decode"][-1].captures


def captured(model) -> list[RiverExecutor]:
    """Returns the executors of a model's captured graphs."""
    return [executor for executor in executors_of(model) if executor.captures is not None]


@contextlib.contextmanager
def uncaptured(model) -> Iterator[None]:
    """Inside, captured graphs of a model run as plain calls of the same steps. They must all have been compiled."""
    executors = [(executor, executor.captures) for executor in captured(model)]
    for executor, _ in executors:
        executor.captures = None
    launched = []
    with on_step(lambda state, step: launched.append(state.device is not None)):
        yield
    for executor, captures in executors:
        executor.captures = captures
    assert not any(launched), "a graph was compiled inside"


def run(decoder: Decoder, steps) -> tuple[list, list]:
    """Takes steps (cache number, depth or None, threshold or None) on two new caches; returns logits and caches."""
    caches = [decoder.start(seed) for seed in range(2)]
    logits = [decoder.step(caches[c], 3 + i, depth, tau) for i, (c, depth, tau) in enumerate(steps)]
    return logits, caches


def check(decoder: Decoder, steps) -> None:
    """Compares captured steps with uncaptured ones to the bit: logits, keys, values and lengths."""
    actual = run(decoder, steps)
    with uncaptured(decoder.model):
        expected = run(decoder, steps)
    assert_same(steps, expected, actual)


def assert_same(steps, expected, actual) -> None:
    for place, (a, b) in enumerate(zip(expected[0], actual[0], strict=True)):
        assert torch.equal(a, b), f"logits of step {place}, {steps[place]}"
    for a, b in zip(expected[1], actual[1], strict=True):
        for layer, (x, y) in enumerate(zip(cache_state(a), cache_state(b), strict=True)):
            assert torch.equal(x[0], y[0]), f"keys of layer {layer}"
            assert torch.equal(x[1], y[1]), f"values of layer {layer}"
            assert x[2] == y[2], f"length of layer {layer}"


STEP = st.tuples(
    st.integers(0, 1),
    st.one_of(st.none(), st.integers(0, LAYERS)),
    st.sampled_from([None, -1.0, 0.5, 0.8, 0.9, 0.95, 2.0]),
)
STAY, LEAVE = (0, None, 2.0), (0, None, -1.0)
