"""The lowering to the generated kernels, run in Triton's interpreter on CPU tensors.

Every family decodes at every depth with fused twins and, from the same traced graphs and the same 4-bit grids, with the
unfused twins of the CPU lowering's passes in float32: logits, cache entries, slots and lengths agree.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from river_compile import backend, report, river
from river_compile.lowering_choice import Lowering
from tests.decoding import cache_state, decode, new_cache
from tests.families import REWRITTEN, make

LAYERS = 2
DEPTHS = [0, 1, LAYERS, 0]
OPTIONS = {"quantizer": "rtn", "group_size": 32, "first_exit": 1}
FUSED = Lowering("eager", "triton", fuse=True)
UNFUSED = Lowering("eager", "plain", fuse=False)
BLOCK_RULES = ("norm + q|k|v", "rope + kv write", "attention", "o + residual", "norm + gate|up", "down + residual")


@contextlib.contextmanager
def lowered(lowering: Lowering) -> Iterator[None]:
    """Makes the backend use a lowering, whatever the options say."""
    with mock.patch.object(backend, "choose_lowering", return_value=lowering):
        yield


class Both:
    """A backend that lowers each traced graph in two ways; `fused` says which one runs."""

    def __init__(self) -> None:
        self.fused = True

    def __call__(self, graph_module, inputs):
        made = {}
        for lowering in (FUSED, UNFUSED):
            with lowered(lowering):
                made[lowering.fuse] = river(graph_module, inputs, options=OPTIONS)
        return lambda *args: made[self.fused](*args)


@functools.cache
def run(name: str) -> dict[str, object]:
    model = make(name, layers=LAYERS)
    both = Both()
    model.compile(backend=both)
    results = {}
    for fused in (True, False):
        both.fused = fused
        cache = new_cache(model, "static")
        logits = decode(model, cache, DEPTHS)
        results[fused] = logits, cache_state(cache)
    graphs = report(model).to_dict()["graphs"]
    return {"results": results, "graph": next(g for g in graphs if g["kind"] == "decode" and g["fused"])}


@pytest.mark.parametrize("name", REWRITTEN)
def test_fused_twins_compute_what_their_nodes_did(name):
    """Logits of every step, and keys, values and lengths of every layer."""
    (fused, fused_cache), (plain, plain_cache) = (run(name)["results"][f] for f in (True, False))
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for a, b in zip(fused_cache, plain_cache, strict=True):
        torch.testing.assert_close(a[:2], b[:2], rtol=1e-4, atol=1e-4)
        assert a[2] == b[2]
