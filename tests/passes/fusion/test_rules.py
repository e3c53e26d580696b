"""Each fusion rule on graphs of every spelling: fused graphs compute the same, and a rule that does not match says why.

Decoders run at depth 0 (all twins) with generated kernels in Triton's interpreter, and with the same 4-bit weights
without fusion as the reference.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.backend import river
from river_compile.building.graph_record import Graphs
from river_compile.exits import forced_depth
from river_compile.record import record_of
from tests.passes.decoders import Spelling, decoder, spellings
from tests.support.examples import examples
from tests.support.lowerings import BLOCK_RULES, FUSED, OPERATORS

OPTIONS = {"quantizer": "rtn", "group_size": 32, "first_exit": 1}

# Spelling -> the rules that miss, each with a part of its reason.
CASES = {
    "llama": (Spelling(), {}),
    "one sequence": (Spelling(batch=1), {}),
    "qwen2: biases": (Spelling(bias="qkv"), {}),
    "qwen3: norms of heads": (Spelling(head_norm=True), {}),
    "phi3: fused matrices": (Spelling(projections="fused", bias="qkv"), {}),
    "gemma: 1 + weight, written attention": (
        Spelling(norm="rms_plus_one", activation="gelu_tanh", attention="written", mask="where"),
        {},
    ),
    "gpt2: layer norm, no rotation, no gate": (
        Spelling(norm="layer", rotation="none", gated=False, activation="gelu_written"),
        {},
    ),
    "opt": (Spelling(norm="layer", rotation="none", gated=False, activation="relu"), {}),
    "partial rotation": (Spelling(rotation="partial", activation="gelu"), {}),
    "interleaved rotation": (Spelling(rotation="interleaved"), {}),
    "called rms norm": (Spelling(norm="rms_called"), {}),
    "gpt-oss: sinks, a rotation by halves": (
        Spelling(rotation="by_halves", attention="sinks", mask="where"),
        {},
    ),
    "rotation by halves": (Spelling(rotation="by_halves"), {}),
    "scaled query": (Spelling(query_scale=True), {}),
    "one mask for all": (Spelling(mask="row"), {}),
    "no norm": (Spelling(norm="none"), {"norm + q|k|v": "no norm that the kernel supports"}),
    "parallel": (Spelling(norm="layer", parallel=True, gated=False), {"norm + gate|up": "merged with q|k|v"}),
    "sandwich norms": (
        Spelling(sandwich=True),
        {"o + residual": "a norm stands between", "down + residual": "a norm stands between"},
    ),
    "scaled residual": (
        Spelling(residual=0.5),
        {"o + residual": "mul stands between", "down + residual": "mul stands between"},
    ),
    "growing cache": (Spelling(cache="grown"), {"rope + kv write": "grows", "attention": "grows"}),
    "no mask": (Spelling(mask="none"), {}),
    "bias on the scores": (Spelling(mask="bias", attention="written"), {}),
    "a mask for every head": (Spelling(mask="heads"), {"attention": "not one row of slots"}),
    "gate last": (Spelling(projections="fused", up_first=True), {"norm + gate|up": "with the gate first"}),
    "unknown activation": (Spelling(activation="tanh"), {"norm + gate|up": "no activation that the kernel supports"}),
}


def run(graph_module, inputs, lowering, depth: int = 0):
    """Runs one decode step; returns its outputs, the inputs afterwards, and the fusions."""
    clones = [t.clone() for t in inputs]
    executor = river(graph_module, inputs, options={**OPTIONS, "kernels": lowering})
    with torch.no_grad(), forced_depth(depth):
        outputs = executor(*clones)
    return outputs, clones, record_of(inputs).of(Graphs)[-1].fusions


def assert_same(first, second) -> None:
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_rules_match_or_say_why_not(case):
    spelling, expected = CASES[case]
    graph_module, inputs = decoder(spelling)
    fused = run(graph_module, inputs, FUSED)
    assert_same(fused, run(graph_module, inputs, OPERATORS))
    missed = {f.rule: f for f in fused[2] if f.missed}
    assert set(missed) == set(expected)
    for rule, fusion in missed.items():
        assert expected[rule] in fusion.missed
        assert fusion.node
    applied = {(f.segment, f.rule) for f in fused[2] if not f.missed}
    assert applied >= {(twin, r) for twin in ("twin_1", "twin_2") for r in BLOCK_RULES if r not in missed}


def test_a_full_ring_buffer_is_left_to_inductor():
    """Its entries move with each token; accelerated models use full static caches instead."""
    graph_module, inputs = decoder(Spelling(cache="rolled"))
    fused = run(graph_module, inputs, FUSED)
    assert_same(fused, run(graph_module, inputs, OPERATORS))
    missed = {f.rule: f.missed for f in fused[2] if f.missed}
    assert set(missed) == set(BLOCK_RULES)
    assert missed["attention"] == "no attention over a static cache was recognized"


@examples(25)
@given(how=spellings(most_blocks=2), seed=st.integers(0, 2**16), depth=st.integers(0, 2))
def test_fusion_keeps_the_function_of_any_graph(how, seed, depth):
    graph_module, inputs = decoder(how, seed)
    assert_same(run(graph_module, inputs, FUSED, depth), run(graph_module, inputs, OPERATORS, depth))
