"""Twins of mixtures of experts: stacked matrices in 4 bits, of which a token reads those that its router chose."""

from __future__ import annotations

import functools

import pytest
import torch

from river_compile import collect_statistics, report, save_twins
from river_compile.kernels.quant.grid import decibels
from river_compile.passes.experts import ROUTER
from river_compile.twins.observe import ExpertMoments
from tests.support.families import prompt
from tests.support.lowerings import FUSED, UNQUANTIZED
from tests.support.traced import TracedStep, dequantized

# A family, how its experts are computed, the matrix of each block that stays in 16 bits, and the experts of a token.
MODELS = {
    "mixtral": ("mixtral", None, "mlp.gate", 2),
    "qwen3_moe": ("qwen3_moe", "batched_mm", "mlp.gate", 2),
    "gpt_oss": ("gpt_oss", None, "mlp.router", 2),
    "deepseek_v3": ("deepseek_v3", None, "mlp.gate.weight", 2),
    "llama4": ("llama4", None, "feed_forward.router", 1),
}


@functools.cache
def traced(name):
    family, experts, *_ = MODELS[name]
    return TracedStep(family, experts=experts)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_through_4_bit_experts(name):
    """Its logits, and the cache it leaves, are those of the model with dequantized weights, experts' among them."""
    step = traced(name)
    plain = step.run(kernels=UNQUANTIZED)
    assert torch.equal(plain, step.reference({}))
    logits = step.run(quantizer="rtn")
    weights = dequantized(step.model, _graph(step))
    stacks = [weight for key, weight in weights.items() if ".experts." in key]
    assert [w.dim() for w in stacks] == [3, 3, 3, 3]
    torch.testing.assert_close(logits, step.reference(weights), rtol=1e-4, atol=1e-4)
    assert (logits - plain).norm() > 0.02 * plain.norm()
    kept = report(step.model).graphs[-1].kept
    assert [k.name for k in kept] == [f"model.layers.{i}.{MODELS[name][2]}" for i in range(2)]
    if name != "deepseek_v3":  # (which casts its weight)
        assert {k.reason for k in kept} == {ROUTER}


@pytest.mark.parametrize("name", MODELS)
def test_a_token_reads_the_experts_that_it_chose(name):
    """Of four in each stack; of all other matrices everything. The report says so, and what the twins hold in all."""
    step = traced(name)
    step.run(quantizer="rtn")
    graph = report(step.model).graphs[-1]
    stacks = sum(site.nbytes for site in _graph(step) if site.matmul.experts)
    others = sum(site.nbytes for site in _graph(step) if not site.matmul.experts)
    assert graph.packed_bytes == stacks + others
    assert graph.token_bytes == stacks * MODELS[name][3] // 4 + others
    assert "experts      a token reads" in str(report(step.model))


@pytest.mark.parametrize("name", MODELS)
def test_a_token_through_4_bit_experts_fills_the_slots_of_the_plain_model(name):
    """The same tensors are written, at the same places, with values close to the plain model's."""
    step = traced(name)
    plain, quantized = step.written(kernels=UNQUANTIZED), step.written(quantizer="rtn")
    assert plain.keys() == quantized.keys()
    assert len(plain) >= 4
    for place, before in plain.items():
        after = quantized[place]
        assert torch.equal(before != 0, after != 0)
        cosine = torch.nn.functional.cosine_similarity(before.double().flatten(), after.double().flatten(), dim=0)
        assert cosine > 0.9


def test_generated_kernels_give_the_same_token():
    """In Triton's interpreter, by one row after another."""
    step = traced("gpt_oss")
    expected = step.run(quantizer="rtn")
    actual = step.run(quantizer="rtn", kernels=FUSED)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "quantizer"), [("gpt_oss", "gptq"), ("llama4", "awq")])
def test_what_experts_read_makes_their_outputs_better(name, quantizer):
    """Each expert's moments are its own tokens'; outputs on the text err less than those of the nearest integers."""
    step = traced(name)
    text = [prompt(60, 2, seed=i) for i in range(2)]
    observed = collect_statistics(step.model, text, progress=False)
    stack = step.model.get_parameter(next(n for n, p in step.model.named_parameters() if p.dim() == 3))
    moments = observed.moments_of(stack)
    tokens = [moments.for_expert(expert)[1] for expert in range(4)]
    assert sum(tokens) == 240 * step.model.config.num_experts_per_tok
    assert min(tokens) > 0
    step.run(quantizer="rtn")
    plain = {site.name: site for site in _graph(step) if site.matmul.experts}
    step.run(quantizer=quantizer)
    for site in (site for site in _graph(step) if site.matmul.experts):
        moments = observed.moments_of(step.model.get_parameter(site.name))
        weight = step.model.get_parameter(site.name)
        weight = (weight.mT if site.matmul.transposed else weight).detach()
        signal = noise = 0.0
        for expert, near in enumerate(plain[site.name].dequantize().view(weight.shape)):
            inputs, count = moments.for_expert(expert)
            signal += count * inputs.energy(weight[expert])
            noise += count * inputs.energy(weight[expert] - near)
        assert site.output_sqnr > decibels(signal, noise) + 0.3


def test_experts_that_no_token_reached_count_what_the_others_read():
    moments = ExpertMoments(3, 4)
    x = torch.randn(6, 4)
    moments.add(0, x[:2])
    moments.add(2, x[2:])
    torch.testing.assert_close(moments.for_expert(1)[0].matrix(), x.T @ x / 6)
    assert [moments.for_expert(expert)[1] for expert in range(3)] == [2, 0, 4]


def test_experts_are_saved_and_read(tmp_path):
    """Saved twins hold stacks, transposed ones too, and give the same bytes and logits."""
    first = traced("gpt_oss")
    logits = first.run(quantizer="rtn")
    save_twins(first.model, tmp_path / "twins")
    second = TracedStep("gpt_oss")
    assert torch.equal(second.run(quantizer="rtn", twins=tmp_path / "twins"), logits)
    sites = {site.name: site for site in report(second.model).graphs[-1].twins}
    assert sum(site.matmul.experts == 4 and str(tmp_path) in site.folder for site in sites.values()) == 4


def _graph(step):
    return report(step.model).graphs[-1].twins
