"""gpt-oss's checkpoints with MXFP4 experts: the text and the scores of the dequantized model, from a quarter of it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

import river_compile
from river_compile import report
from river_compile.cli.shared import load
from river_compile.errors import OptionError
from river_compile.kernels.native.build import choose_isa
from river_compile.kernels.quant import layouts
from river_compile.kernels.quant.mxfp4 import Mxfp4Stack, find_mxfp4
from tests.lowering.test_packed_backbone import generate
from tests.support.families import MORE_CONFIGS
from tests.support.layout import ROOT, run_python
from tests.support.tokenizers import byte_tokenizer
from tools.families.mxfp4 import write_gpt_oss

pytestmark = pytest.mark.skipif(choose_isa().name == "portable", reason="needs vectors")

SHARD = "model-00002-of-00002.safetensors"
STACK = "model.layers.1.mlp.experts.down_proj"
OPTIONS = {"quantizer": "rtn", "group_size": 32, "kernels": "native", "background_packing": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two layers."""
    folder = tmp_path_factory.mktemp("gpt_oss")
    write_gpt_oss(folder, MORE_CONFIGS["gpt_oss"](2))
    return folder


def dequantized(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def accelerated(model, drafts=0, **options):
    return river_compile.accelerate(model, num_assistant_tokens=drafts, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def expected(folder):
    """What the dequantized model, whose experts are transposed stacks in 16 bits, writes without drafts."""
    return generate(accelerated(dequantized(folder), target_weights="model"))


@pytest.mark.parametrize(
    ("load", "options"),
    [
        (river_compile.load_mxfp4, {}),
        (river_compile.load_mxfp4, {"target_weights": "model"}),
        (dequantized, {"target_weights": "12bit"}),  # which finds out that they are MXFP4
    ],
    ids=["as it comes", "others in 16 bits", "found in 16 bits"],
)
def test_text_and_scores_are_those_of_the_dequantized_model(folder, expected, load, options):
    model = accelerated(load(folder), **options)
    assert all(map(torch.equal, generate(model), expected))
    stacks = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj")))
    graph = next(graph for graph in report(model).to_dict()["graphs"] if graph["kind"] == "decode")
    assert graph["expert_bytes"] == stacks * 17 // 32
    assert graph["chosen_bytes"] == graph["expert_bytes"] // 2
    assert graph["fused"]["router + experts"] == graph["fused"]["attention"] == 4  # in layers and twins
    assert graph["missed"] == []
    assert {unit for graph in report(model).graphs for unit in graph.captures.uncaptured_units} == set()


def test_stacks_that_were_found_in_16_bits_are_found_once(folder, expected, tmp_path, monkeypatch):
    """A later process reads them from the compile cache."""
    monkeypatch.setenv("RIVER_COMPILE_CACHE_DIR", str(tmp_path))
    looked: list[torch.Tensor] = []
    monkeypatch.setattr(layouts, "find_mxfp4", lambda weight: looked.append(weight) or find_mxfp4(weight))
    for times in (2 * 2 * 4, 0):  # layers, stacks, experts
        model = accelerated(dequantized(folder), target_weights="12bit")
        assert all(map(torch.equal, generate(model), expected))
        assert len(looked) == times
        looked.clear()
        graph = next(graph for graph in report(model).to_dict()["graphs"] if graph["kind"] == "decode")
        assert 0 < graph["expert_bytes"] < 0.3 * 2 * sum(p.numel() for p in model.parameters() if p.dim() == 3)
    (file,) = tmp_path.glob("backbone-*/packed/twins.safetensors")
    stored = {tensor.dtype for name, tensor in load_file(file).items() if "experts" in name}
    assert stored == {torch.uint8}


def test_a_twin_has_the_layers_experts(folder, expected):
    """Drafts read the same bytes, which are counted once, and change neither text nor scores."""
    model = accelerated(river_compile.load_mxfp4(folder), drafts=3)
    assert all(map(torch.equal, generate(model), expected))
    graph = next(graph for graph in report(model).to_dict()["graphs"] if graph["kind"] == "decode")
    assert 0 < graph["packed_bytes"] < graph["expert_bytes"] < graph["token_bytes"] + graph["chosen_bytes"]


def test_the_loaded_model_is_that_of_transformers(folder):
    """Its parameters' values, and its text without acceleration, chosen experts being copied."""
    ours, plain = river_compile.load_mxfp4(folder), dequantized(folder)
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert isinstance(a, Mxfp4Stack) == name.endswith(("gate_up_proj", "down_proj"))
    assert all(map(torch.equal, generate(ours), generate(plain)))


def test_saving_is_an_error_that_names_the_checkpoint(folder, tmp_path):
    with pytest.raises(RuntimeError, match="Copy the checkpoint's folder"):
        river_compile.load_mxfp4(folder).save_pretrained(tmp_path)


def test_from_pretrained_keeps_experts_in_4_bits(folder):
    """Unless an argument asks for something else."""
    model = river_compile.from_pretrained(folder, compile_cache=False)
    assert isinstance(model.get_parameter(STACK), Mxfp4Stack)
    model = river_compile.from_pretrained(folder, dtype=torch.float32, compile_cache=False)
    assert not isinstance(model.get_parameter(STACK), Mxfp4Stack)


def test_commands_that_only_run_a_model_keep_experts_in_4_bits(folder, tmp_path):
    """Not those that also run or save the plain model."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    byte_tokenizer().save_pretrained(tmp_path)
    for as_it_comes in (True, False):
        model, _ = load(tmp_path, as_it_comes=as_it_comes)
        assert isinstance(model.get_parameter(STACK), Mxfp4Stack) == as_it_comes
    model, _ = load(tmp_path, torch.float32, as_it_comes=True)
    assert model.get_parameter(STACK).dtype == torch.float32


def test_other_kernels_are_an_error(folder):
    model = accelerated(river_compile.load_mxfp4(folder), target_kernels="model")
    with pytest.raises(OptionError, match=r"model\.layers\.0\.mlp\.experts\.\w+ has MXFP4 weights, which only"):
        generate(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float32}, "require dtype=torch.bfloat16, not torch.float32"),
        ({"device_map": "cpu"}, "device_map= has no place"),
        ({"quantization_config": object()}, "quantization_config= has no place"),
    ],
)
def test_what_loading_refuses(folder, arguments, message):
    with pytest.raises(OptionError, match=message):
        river_compile.load_mxfp4(folder, **arguments)


def test_a_checkpoint_in_16_bits_is_refused(folder, tmp_path):
    dequantized(folder).save_pretrained(tmp_path)
    with pytest.raises(OptionError, match="has no experts in MXFP4"):
        river_compile.load_mxfp4(tmp_path)


def no_number(tensors):
    tensors[f"{STACK}_scales"][1, 2, 3] = 255


def fewer_groups(tensors):
    tensors[f"{STACK}_scales"] = tensors[f"{STACK}_scales"][..., :-1].contiguous()


def missing_scales(tensors):
    del tensors[f"{STACK}_scales"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_number, "scale 255, NaN, in group 3 of row 2 of expert 1"),
        (fewer_groups, r"blocks \(4, 64, 4, 16\) and scales \(4, 64, 3\)"),
        (missing_scales, "has no scales"),
    ],
)
def test_damage_is_named(folder, tmp_path, change, message):
    tensors = load_file(folder / SHARD)
    change(tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != SHARD or k in tensors}
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file(tensors, tmp_path / SHARD, {"format": "pt"})
    with pytest.raises(OptionError, match=f"Cannot load the checkpoint: {STACK} .*{message}"):
        river_compile.load_mxfp4(tmp_path)


_LOAD = """
import re, torch
from river_compile.api.mxfp4 import load_mxfp4
from river_compile.upstream.tensors import parts_of

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def read(folder):
    model = load_mxfp4(folder)
    for part in (part for parameter in model.parameters() for part in parts_of(parameter)):
        part.view(-1).view(torch.uint8).max()
    return model

read("small")  # imports what is needed
before = peak()
model = read("large")
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_makes_no_copy_in_16_bits(tmp_path):
    """At its peak a process grows by the checkpoint's bytes, of which 16 bits would be almost four times."""
    config = MORE_CONFIGS["gpt_oss"](4)
    write_gpt_oss(tmp_path / "small", config)
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_local_experts": 32}
    experts = write_gpt_oss(tmp_path / "large", GptOssConfig(**{**config.to_dict(), **sizes}))
    grown = int(run_python(_LOAD, tmp_path, ROOT).stdout.splitlines()[-1])
    assert 50e6 < experts < grown < 1.15 * experts + 20e6
