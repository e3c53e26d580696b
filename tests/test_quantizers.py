"""Twins of quantizers that know their inputs: folded scales, the floor of quality, artifacts, errors by block."""

from __future__ import annotations

import json

import pytest
import torch
from river_compile.kernels import calibrated

import river_compile.twin_maker
from river_compile import ArtifactError, OptionError, block_errors, observe, report, river, save
from river_compile.artifact import MANIFEST
from tests.decoding import decode, new_cache
from tests.families import make, prompt

OPTIONS = {"lowering": "eager", "group_size": 32, "first_exit": 1, "threshold": -1.0}
TEXTS = [prompt(40, 2, seed=i) for i in range(3)]
FLOOR = "SQNR below min_sqnr="


def run(model, **options):
    """Compiles the model afresh, decodes a token at depth 1 and one at depth 0, and returns their logits."""
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, **options})
    return torch.stack(decode(model, new_cache(model, "static"), [1, 0])[1:])


def observed(family="llama", seed=0):
    model = make(family, layers=2, seed=seed)
    observe(model, inputs=TEXTS, progress=False)
    return model


def packed_by_name(model, quantizer):
    return {site.name: site for site in report(model).packed if site.quantizer == quantizer}


@pytest.mark.parametrize(
    ("family", "folded", "multiplied"),
    [
        ("llama", 2, 1),  # both norms; the gated product
        ("gpt2", 2, 1),  # layer norms with weight and bias; GELU ends in a product
        ("gemma3", 0, 3),  # norms that multiply by 1 + weight are left alone
        ("phi", 1, 0),  # one layer norm in front of attention and MLP
        ("olmo2", 0, 1),  # no norm in front of the linears
    ],
)
def test_folding_a_scale_changes_nothing(family, folded, multiplied, monkeypatch):
    """With scales that are powers of two, 4-bit products of scaled inputs have the bits of unscaled ones."""
    model = observed(family)
    monkeypatch.setattr(calibrated, "ALPHAS", (0.0,))
    unscaled = run(model, quantizer="awq")
    sites = packed_by_name(model, "awq").values()
    assert all(site.input_scale is None for site in sites)

    def two_and_half(squares, alpha):
        return torch.where(torch.arange(len(squares)) // 32 % 2 == 0, 2.0, 0.5)

    monkeypatch.setattr(calibrated, "ALPHAS", (1.0,))
    monkeypatch.setattr(calibrated, "_input_scale", two_and_half)
    observe(model, inputs=TEXTS, progress=False)
    assert torch.equal(run(model, quantizer="awq"), unscaled)
    twins = report(model).graphs[-1].packed
    block = [site for site in twins if ".0." in site.name and site.input_scale is not None]
    assert len(block) == folded + multiplied
    modules = dict(model.named_modules())
    biased = [any(getattr(modules[n], "bias", None) is not None for n in site.name.split("|")) for site in block]
    extra = [len(site.tensors) - 2 - has_bias for site, has_bias in zip(block, biased, strict=True)]
    per_norm = 2 if family in ("gpt2", "phi") else 1  # a layer norm has a bias too
    assert sorted(extra) == sorted([per_norm] * folded + [1] * multiplied)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_twins_multiply_by_what_they_say(family, monkeypatch):
    """A prompt and a token in 4 bits equal the model with dequantized weights in place, within bfloat16's rounding."""
    monkeypatch.setattr(calibrated, "ALPHAS", (0.5,))
    model = observed(family)
    torch._dynamo.reset()
    model.compile(backend=river, options={**OPTIONS, "quantizer": "awq", "exit_depth": 0, "prefill": "exit"})
    logits = decode(model, new_cache(model, "static"), [None])
    plain = make(family, layers=2)
    put_in_place(plain, report(model).packed)
    for ours, theirs in zip(logits, decode(plain, new_cache(plain, "static"), [None]), strict=True):
        assert (ours[-1] - theirs[-1]).norm() < 0.02 * theirs[-1].norm()
    backbone = decode(make(family, layers=2), new_cache(plain, "static"), [None])
    assert (logits[1][-1] - backbone[1][-1]).norm() > 0.04 * backbone[1][-1].norm()


def put_in_place(model, sites):
    """Replaces weights by what twins multiply by."""
    modules = dict(model.named_modules())
    for site in sites:
        for part, name in zip(site.dequantize().split(site.out_features), site.name.split("|"), strict=True):
            modules[name].weight.data = part.T.contiguous() if site.transposed else part


@pytest.mark.parametrize("quantizer", ["awq", "gptq"])
def test_what_was_not_observed_is_a_value_error(quantizer):
    model = make("llama", layers=2)
    with pytest.raises(ValueError, match=rf"quantizer='{quantizer}' needs .* call river_compile.observe\(model"):
        run(model, quantizer=quantizer)
    assert report(model).packed == ()
    observe(model, inputs=TEXTS, progress=False).clear()
    with pytest.raises(OptionError, match=r"no text reached model.layers.0.self_attn.q_proj"):
        run(model, quantizer=quantizer)


def test_other_texts_make_other_twins():
    model = observed()
    first = run(model, quantizer="gptq")
    assert torch.equal(run(model, quantizer="gptq"), first)
    observe(model, inputs=[prompt(60, seed=9)], progress=False)
    assert not torch.equal(run(model, quantizer="gptq"), first)


class TestFloor:
    """`min_sqnr`: matrices below it stay in 16 bits, and the report says so."""

    @pytest.fixture(scope="class")
    def model(self):
        """A llama with one matrix that 4 bits serve badly: a few weights stretch every group's grid."""
        model = make("llama", layers=2)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[:, ::16] *= 40
        observe(model, inputs=TEXTS, progress=False)
        return model

    @pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
    def test_what_lies_below_stays_in_16_bits(self, model, quantizer):
        run(model, quantizer=quantizer)
        sites = packed_by_name(model, quantizer)
        low = "model.layers.1.mlp.down_proj"
        if quantizer == "gptq":
            low = min(sites, key=lambda name: sites[name].quality)
        others = [site.quality for name, site in sites.items() if name != low]
        floor = (sites[low].quality + min(others)) / 2
        assert sites[low].quality < floor
        run(model, quantizer=quantizer, min_sqnr=floor)
        decode_graph = report(model).graphs[-1]
        assert {k.name for k in decode_graph.kept} == set(low.split("|"))
        assert decode_graph.kept[0].reason == f"{FLOOR}{floor:g} dB"
        kept = [site for site in decode_graph.packed if site.kept]
        assert [site.name for site in kept] == [low]
        assert kept[0].nbytes == 0
        assert f"{FLOOR}{floor:g} dB" in str(report(model))
        entry = next(m for m in report(model).to_dict()["matrices"] if m["in_16_bits"])
        assert (entry["name"], entry["bytes"]) == (low, 0)

    def test_a_floor_that_nothing_passes_gives_the_plain_model(self, model):
        logits = run(model, quantizer="rtn", min_sqnr=1000)
        plain = torch.stack(decode(model, new_cache(model, "static"), [None, None], compiled=False)[1:])
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        assert len(report(model).graphs[-1].kept) == 14

    def test_a_floor_that_all_pass_changes_nothing(self, model):
        assert torch.equal(run(model, quantizer="rtn", min_sqnr=-100), run(model, quantizer="rtn"))

    @pytest.mark.parametrize("floor", ["20", True, float("nan")])
    def test_what_is_no_number_is_refused(self, floor):
        with pytest.raises(OptionError, match=r"min_sqnr=.* is not allowed; it must be None or a number of decibels"):
            run(make("llama", layers=2), min_sqnr=floor)


class TestArtifacts:
    @pytest.mark.parametrize("quantizer", ["awq", "gptq"])
    def test_the_second_start_needs_no_text(self, quantizer, tmp_path, monkeypatch):
        """Equal bytes, ratios and logits without an observation; scales are folded into the norms again."""
        monkeypatch.setattr(calibrated, "ALPHAS", (0.0, 0.3))
        first = observed("gpt2")
        logits = run(first, quantizer=quantizer)
        save(first, tmp_path / "twins")
        monkeypatch.setattr(river_compile.twin_maker, "quantize_observed", lambda *_: pytest.fail("quantized"))
        second = make("gpt2", layers=2)
        assert torch.equal(run(second, quantizer=quantizer, artifact=tmp_path / "twins"), logits)
        for a, b in zip(report(first).packed, report(second).packed, strict=True):
            assert (a.name, a.sqnr, a.output_sqnr) == (b.name, b.sqnr, b.output_sqnr)
            assert (a.input_scale is None) == (b.input_scale is None)
            assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
        if quantizer == "awq":
            assert any(site.input_scale is not None for site in report(second).packed)

    def test_a_changed_norm_is_another_model(self, tmp_path):
        """Scales were folded into it, so it belongs to what the twins were made from."""
        first = observed()
        run(first, quantizer="awq")
        save(first, tmp_path / "twins")
        second = make("llama", layers=2)
        with torch.no_grad():
            second.model.layers[1].input_layernorm.weight[3] += 1
        with pytest.raises(ArtifactError, match=r"layers.1.self_attn.q_proj.* was made from other weights"):
            run(second, quantizer="awq", artifact=tmp_path / "twins")

    def test_decisions_of_the_floor_are_kept(self, tmp_path):
        first = observed()
        run(first, quantizer="gptq")
        ratios = sorted(site.quality for site in report(first).packed)
        floor = (ratios[2] + ratios[3]) / 2
        first = observed()
        logits = run(first, quantizer="gptq", min_sqnr=floor)
        save(first, tmp_path / "twins")
        stored = [m["stored"] for m in json.loads((tmp_path / "twins" / MANIFEST).read_text())["matrices"]]
        assert (len(stored), sum(stored)) == (len(ratios), len(ratios) - 3)
        second = make("llama", layers=2)
        saved = {"quantizer": "gptq", "artifact": tmp_path / "twins"}
        assert torch.equal(run(second, min_sqnr=floor, **saved), logits)
        assert report(second).graphs[-1].kept == report(first).graphs[-1].kept
        with pytest.raises(ArtifactError, match=r"was left in 16 bits at .* dB, below the min_sqnr= of that time"):
            run(make("llama", layers=2), **saved)
        higher = make("llama", layers=2)  # a higher floor needs nothing that is not there
        run(higher, min_sqnr=ratios[4], **saved)
        assert sum(site.kept for site in report(higher).graphs[-1].packed) == 4


class TestBlockErrors:
    def test_each_block_alone_against_a_reference(self):
        """KL with one block's weights replaced by hand, and nothing of the model changed afterwards."""
        model = observed()
        run(model, quantizer="rtn")
        before = {name: p.clone() for name, p in model.state_dict().items()}
        ids = [prompt(30, 2, seed=20), prompt(15, seed=21)]
        errors = block_errors(model, inputs=ids, progress=False)
        assert (errors.tokens, [b.block for b in errors.blocks]) == (75, [1, 2])
        assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
        assert all(b.path == f"model.layers.{b.block - 1}" for b in errors.blocks)
        sites = packed_by_name(model, "rtn")
        for b in errors.blocks:
            other = make("llama", layers=2)
            inside = [site for site in sites.values() if site.name.startswith(f"{b.path}.")]
            put_in_place(other, inside)
            total = 0.0
            with torch.no_grad():
                for row in ids:
                    p, q = (m.forward(input_ids=row).logits.double().log_softmax(-1) for m in (model, other))
                    total += (p.exp() * (p - q)).sum().item()
            assert b.kl == pytest.approx(total / 75, rel=1e-3)
            assert b.kl > 0
            assert b.sqnr == min(site.sqnr for site in inside)

    def test_transposed_matrices_and_the_report(self):
        model = observed("gpt2")
        run(model, quantizer="gptq")
        errors = block_errors(model, inputs=TEXTS[:1], progress=False)
        assert 0 < errors.mean_kl <= errors.worst.kl < 1
        assert f"KL by block    mean {errors.mean_kl:.5f}, most {errors.worst.kl:.5f}" in str(report(model))
        assert json.loads(json.dumps(report(model).to_dict()))["block_errors"] == errors.to_dict()
        assert f"{errors.worst.kl:.5f}" in str(errors)

    def test_a_block_that_stays_in_16_bits_costs_nothing(self):
        model = observed()
        run(model, quantizer="rtn", min_sqnr=1000)
        errors = block_errors(model, inputs=TEXTS[:1], progress=False)
        assert [b.kl for b in errors.blocks] == [0, 0]
        assert "16 bits" in str(errors)

    def test_a_model_without_twins_is_refused(self):
        with pytest.raises(ValueError, match="no twin is packed; generate a token"):
            block_errors(make("llama", layers=2), inputs=TEXTS)


def test_the_report_names_quantizer_and_both_ratios():
    model = observed()
    run(model, quantizer="gptq")
    text, entries = str(report(model)), report(model).to_dict()["matrices"]
    assert "packed         8 matrices (gptq)" in text
    assert "SQNR of weights" in text
    assert "SQNR of outputs" in text
    assert all(e["quantizer"] == "gptq" and e["output_sqnr_db"] > e["sqnr_db"] > 10 for e in entries)
    json.dumps(entries)
