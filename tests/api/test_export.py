"""Exported twins: transformers loads them as a 4-bit model whose logits are the twins'."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import river_compile
from river_compile import RiverError, export, report
from river_compile.api.export import FORMATS
from river_compile.backend import river
from river_compile.building.graph_record import Graphs
from river_compile.errors import OptionError, TwinsError
from river_compile.kernels.quant.data_free import quantize
from river_compile.record import find_record
from tests.support.decoding import decode, new_cache
from tests.support.examples import slow
from tests.support.families import make, prompt
from tests.support.lowerings import OPERATORS
from tests.support.traced import TracedStep

OPTIONS = {"kernels": OPERATORS, "quantizer": "symmetric", "group_size": 32, "exit_depth": 0, "prefill": "exit"}


def packed(family="llama", quantizer="symmetric"):
    """Returns a model whose twins are packed."""
    step = TracedStep(family)
    step.run(quantizer=quantizer)
    return step.model


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_loads_the_twins(family, tmp_path):
    """Merged linears come apart, biases stay, the head and the embedding keep 16 bits (here 32)."""
    pytest.importorskip("compressed_tensors", reason="transformers needs it to read the format")
    model = make(family, layers=2)
    model.compile(backend=river, options=OPTIONS)
    logits = torch.cat(decode(model, new_cache(model, "static"), [None, None]), dim=1)
    folder = export(model, tmp_path / "w4")
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    again = torch.cat(decode(loaded, new_cache(loaded, "static"), [None, None]), dim=1)
    torch.testing.assert_close(again, logits, rtol=1e-4, atol=1e-4)
    plain = torch.cat(decode(model, new_cache(model, "static"), [None, None], compiled=False), dim=1)
    assert (again - logits).norm() < (plain - logits).norm() / 100
    assert torch.equal(loaded.generate(prompt(), max_new_tokens=2)[:, :-2], prompt())


def test_the_folder_holds_nibbles_and_says_so(tmp_path):
    model = packed()
    config = json.loads((export(model, tmp_path / "w4") / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert config["ignore"] == ["lm_head"]
    weights = sum(n * k for n, k in (site.shape for site in report(model).packed))
    saved = sum(p.nbytes for p in model.parameters()) - 4 * weights
    assert (tmp_path / "w4" / "model.safetensors").stat().st_size < saved + weights * (0.5 + 4 / 32) + 20_000


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", "is transposed, and the format holds linear layers only"),
        ("mixtral", "is a stack of experts, and the format holds linear layers only"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(family, words, tmp_path):
    model = packed(family)
    with pytest.raises(TwinsError, match=words):
        export(model, tmp_path / "w4")
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_layers_are_not_found_is_refused(tmp_path):
    with pytest.raises(TwinsError, match=r"the graph holds no list of two or more modules\. Export a model that River"):
        export(make("llama", layers=1), tmp_path / "w4")
    assert list(tmp_path.iterdir()) == []


def test_arguments(tmp_path):
    with pytest.raises(OptionError, match=f"format='gguf' is not allowed; use {FORMATS[0]!r}"):
        export(make("llama"), tmp_path / "w4", format="gguf")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TwinsError, match="it exists and is not an empty folder"):
        river_compile.export(make("llama"), tmp_path)


QUICK = {"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn", "compile_cache": False}


def kept(model):
    """Returns the very objects that River keeps of a model: of each type, of graphs and of twins."""
    record = find_record(model)
    return None if record is None else (dict(record._held), [*record.of(Graphs)], record.of(Graphs).packed)


@pytest.mark.parametrize("state", ["plain", "accelerated", "compiled"])
def test_any_model_is_exported_in_one_step_and_left_as_it_was(state, tmp_path):
    """Its own twins stay, its text too; a plain model has neither twins nor a `generate` of River's afterwards."""
    model, other = make("llama", layers=2), packed("llama")
    if state == "accelerated":
        river_compile.accelerate(model, **QUICK)
    elif state == "compiled":
        model.compile(backend=river, options={"kernels": OPERATORS, "group_size": 32, "quantizer": "rtn"})
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    text = model.generate(prompt(), **settings)
    before = kept(model)
    export(model, tmp_path / "w4")
    assert ("generate" in vars(model)) == (state == "accelerated")
    assert kept(model) == before
    assert torch.equal(model.generate(prompt(), **settings), text)
    export(other, tmp_path / "other")
    saved, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("w4", "other"))
    assert {name for name in saved if name.endswith("_packed")} == {n for n in expected if n.endswith("_packed")}


@pytest.mark.parametrize("ran", [slow(False), True])
def test_twins_are_saved_before_and_after_the_first_token(ran, tmp_path):
    model = river_compile.accelerate(make("llama", layers=2), **QUICK)
    if ran:
        model.generate(prompt(), max_new_tokens=2, do_sample=False)
    folder = river_compile.save_twins(model, tmp_path / "twins")
    again = river_compile.accelerate(make("llama", layers=2), twins=folder, **QUICK)
    assert torch.equal(*(m.generate(prompt(), max_new_tokens=6, do_sample=False) for m in (model, again)))
    assert {twin.folder for twin in report(again).packed} == {str(folder)}


def test_a_model_that_was_never_accelerated_has_no_twins_to_save(tmp_path):
    with pytest.raises(RiverError, match=r"this model has no twins. Call river_compile.accelerate\(model\) first"):
        river_compile.save_twins(make("llama"), tmp_path / "twins")


class TestSymmetric:
    """``quantizer="symmetric"``: multiples of a scale."""

    @pytest.mark.parametrize("shift", [0.0, 0.01, -3.0])
    def test_zero_is_zero_and_scales_are_bfloat16(self, shift):
        """Also of groups far from zero, the largest weight of which the grid reaches."""
        torch.manual_seed(0)
        weight = torch.randn(8, 64) * 0.02 + shift
        grid = quantize(weight, 32, "symmetric")
        assert not grid.zero.any()
        assert torch.equal(grid.scale, grid.scale.bfloat16().float())
        assert (grid.dequantize() - weight).abs().max() <= grid.scale.abs().max() * 2

    @pytest.mark.parametrize("value", [0.0, 0.02, -3.0])
    def test_constant_groups_are_met(self, value):
        weight = torch.full((2, 32), value)
        torch.testing.assert_close(quantize(weight, 32, "symmetric").dequantize(), weight, rtol=1e-2, atol=0)

    def test_it_loses_little_to_grids_with_zeros(self):
        torch.manual_seed(0)
        weight = torch.randn(64, 256) * 0.02
        noise = {how: (quantize(weight, 64, how).dequantize() - weight).norm() for how in ("rtn", "symmetric")}
        assert noise["symmetric"] < 1.1 * noise["rtn"]
