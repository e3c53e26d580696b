"""Twins of quantizers that know their inputs: folded scales, the floor of quality, artifacts."""

from __future__ import annotations

import json

import pytest
import torch

import river_compile.twins.quantize
from river_compile import collect_statistics, report, save_twins
from river_compile.errors import OptionError, TwinsError
from river_compile.kernels.quant import calibrated
from tests.support.families import prompt
from tests.support.traced import TracedStep, dequantized

TEXTS = [prompt(40, 2, seed=i) for i in range(3)]


def observed(family="llama"):
    """Returns a traced step of a model whose inputs were observed."""
    step = TracedStep(family)
    collect_statistics(step.model, TEXTS, progress=False)
    return step


def twins_of(step):
    """Returns the 4-bit products, by name, of the step's latest twins."""
    return {site.name: site for site in report(step.model).graphs[-1].twins}


@pytest.mark.parametrize(
    ("family", "folded", "multiplied"),
    [
        ("llama", 2, 1),  # both norms; the gated product
        ("gpt2", 2, 1),  # layer norms with weight and bias; GELU ends in a product
        ("gemma3", 0, 3),  # norms that multiply by 1 + weight; the gated product
        ("phi", 1, 1),  # one layer norm in front of attention and MLP; GELU
        ("olmo2", 0, 1),  # no norm in front of the linears
    ],
)
def test_folding_a_scale_changes_nothing(family, folded, multiplied, monkeypatch):
    """With scales that are powers of two, 4-bit products of scaled inputs have the bits of unscaled ones."""
    step = observed(family)
    monkeypatch.setattr(calibrated, "ALPHAS", (0.0,))
    unscaled = step.run(quantizer="awq")
    assert all(site.input_scale is None for site in twins_of(step).values())

    def two_and_half(squares, alpha):
        return torch.where(torch.arange(len(squares)) // 32 % 2 == 0, 2.0, 0.5)

    monkeypatch.setattr(calibrated, "ALPHAS", (1.0,))
    monkeypatch.setattr(calibrated, "_input_scale", two_and_half)
    collect_statistics(step.model, TEXTS, progress=False)
    assert torch.equal(step.run(quantizer="awq"), unscaled)

    scaled = [site for site in twins_of(step).values() if ".0." in site.name and site.input_scale is not None]
    modules = dict(step.model.named_modules())
    biased = [any(getattr(modules[n], "bias", None) is not None for n in site.name.split("|")) for site in scaled]
    extra = [len(site.tensors) - 2 - has_bias for site, has_bias in zip(scaled, biased, strict=True)]
    per_norm = 2 if family in ("gpt2", "phi") else 1  # a layer norm has a bias too
    assert sorted(extra) == sorted([per_norm] * folded + [1] * multiplied)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_twins_multiply_by_what_they_say(family, monkeypatch):
    """A token in 4 bits has the logits of the model with dequantized weights, within bfloat16's rounding."""
    monkeypatch.setattr(calibrated, "ALPHAS", (0.5,))
    step = observed(family)
    logits = step.run(quantizer="awq")
    expected = step.reference(dequantized(step.model, twins_of(step).values()))
    assert (logits - expected).norm() < 0.02 * expected.norm()
    backbone = step.reference({})
    assert (logits - backbone).norm() > 0.05 * backbone.norm()


def test_a_matrix_that_no_text_reached_is_named():
    step = TracedStep()
    observed = collect_statistics(step.model, TEXTS, progress=False)
    del observed.moments[step.model.model.layers[0].self_attn.q_proj.weight]
    with pytest.raises(OptionError, match=r"Cannot calibrate model.layers.0.self_attn.q_proj\S*: no token"):
        step.run(quantizer="gptq")


def test_other_texts_make_other_twins():
    step = observed()
    first = step.run(quantizer="gptq")
    assert torch.equal(step.run(quantizer="gptq"), first)
    collect_statistics(step.model, [prompt(60, seed=9)], progress=False)
    assert not torch.equal(step.run(quantizer="gptq"), first)


class TestArtifacts:
    @pytest.mark.parametrize("quantizer", ["awq", "gptq"])
    def test_the_second_start_needs_no_text(self, quantizer, tmp_path, monkeypatch):
        """Equal bytes, ratios and logits without an observation; scales are folded into the norms again."""
        monkeypatch.setattr(calibrated, "ALPHAS", (0.3,))
        first = observed("gpt2")
        logits = first.run(quantizer=quantizer)
        save_twins(first.model, tmp_path / "twins")
        monkeypatch.setattr(
            river_compile.twins.quantize, "quantize_observed", lambda *_, **__: pytest.fail("quantized")
        )
        second = TracedStep("gpt2")
        assert torch.equal(second.run(quantizer=quantizer, twins=tmp_path / "twins"), logits)
        after = twins_of(second)
        for name, a in twins_of(first).items():
            b = after[name]
            assert (a.sqnr, a.output_sqnr) == (b.sqnr, b.output_sqnr)
            assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
            assert (a.input_scale is None) == (b.input_scale is None)
        assert any(site.input_scale is not None for site in after.values()) == (quantizer == "awq")

    def test_a_changed_norm_is_another_model(self, tmp_path):
        """Scales were folded into it, so it belongs to what the twins were made from."""
        first = observed()
        first.run(quantizer="awq")
        save_twins(first.model, tmp_path / "twins")
        second = TracedStep()
        with torch.no_grad():
            second.model.model.layers[1].input_layernorm.weight[3] += 1
        with pytest.raises(TwinsError, match=r"layers.1.self_attn.q_proj.* was made from other weights"):
            second.run(quantizer="awq", twins=tmp_path / "twins")


def test_the_report_names_quantizer_and_both_ratios():
    step = observed()
    step.run(quantizer="gptq")
    text, entries = str(report(step.model)), report(step.model).to_dict()["matrices"]
    assert "packed         8 matrices (gptq)" in text
    assert "SQNR of weights" in text
    assert "SQNR of outputs" in text
    assert all(e["quantizer"] == "gptq" and e["output_sqnr_db"] > e["sqnr_db"] > 10 for e in entries)
    json.dumps(entries)
