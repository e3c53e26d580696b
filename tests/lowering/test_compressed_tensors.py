"""Checkpoints of compressed-tensors in 8 bits: their own weights in exact mode, or an error that says what to do."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from river_compile import accelerate, report
from river_compile.errors import OptionError, UnsupportedGraphError
from river_compile.kernels.native.build import choose_isa
from tests.lowering.test_eight_bit_backbone import accelerated
from tests.lowering.test_packed_backbone import generate
from tests.support.examples import slow_but
from tests.support.families import make

pytest.importorskip("compressed_tensors", reason="transformers needs it to read the format")
pytest.importorskip("transformers", minversion="5.21", reason="older ones load no plain layers")
pytestmark = [
    pytest.mark.skipif(choose_isa().name == "portable", reason="needs vectors"),
    pytest.mark.filterwarnings("ignore::river_compile.RiverWarning"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning"),
]
FLOAT8 = torch.float8_e4m3fn
RANGE = {torch.int8: (-128, 127), FLOAT8: (-448, 448)}
FORMATS = {
    "packed, by row": ("pack-quantized", torch.int8, None),
    "packed, by group": ("pack-quantized", torch.int8, 32),
    "int8": ("int-quantized", torch.int8, None),
    "int8 by group": ("naive-quantized", torch.int8, 32),
    "float8": ("float-quantized", FLOAT8, None),
}


def written(folder, form, kind=torch.int8, group=None, dtype=torch.bfloat16):
    """Writes a tiny model in this format; returns one in float32 with the values that the file stands for."""
    model = make("llama", layers=2, dtype=dtype)
    state, exact = dict(model.state_dict()), make("llama", layers=2, dtype=dtype).float()
    for name, linear in exact.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            grouped = linear.weight.detach().unflatten(1, (-1, group or linear.in_features))
            scale = (grouped.abs().amax(-1, keepdim=True) / (127.5 if kind == torch.int8 else 448)).to(dtype)
            number = grouped / scale.float()
            number = (number.round() if kind == torch.int8 else number).clamp(*RANGE[kind]).to(kind)
            linear.weight = torch.nn.Parameter((number.float() * scale.float()).flatten(1), requires_grad=False)
            number = number.flatten(1)
            state[f"{name}.weight_scale"] = scale.squeeze(-1)
            if form == "pack-quantized":
                del state[f"{name}.weight"]
                state[f"{name}.weight_packed"] = (number.view(torch.uint8) ^ 0x80).view(torch.int32)
                state[f"{name}.weight_shape"] = torch.tensor(number.shape)
            else:
                state[f"{name}.weight"] = number
    model.save_pretrained(folder, state_dict=state)
    weights = {"num_bits": 8, "type": "int" if kind == torch.int8 else "float", "symmetric": True}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return exact


def loaded(folder, **options):
    how = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype="auto", **options).eval()


def bytes_in_8_bits(model):
    sizes = {graph["lossless_bytes"] for graph in report(model).to_dict()["graphs"]}
    return min(sizes)


@pytest.mark.parametrize("form", slow_but(("packed, by group", "float8"), FORMATS))
def test_their_numbers_are_read_as_they_are(tmp_path, form):
    """Scores are as near to those of the file's values as the plain model's, whose weights are rounded to 16 bits."""
    exact = generate(written(tmp_path, *FORMATS[form]))[1]
    own = generate(loaded(tmp_path))[1]
    packed, plain = accelerated(loaded(tmp_path), target_weights="8bit"), loaded(tmp_path)
    text, scores = generate(packed)
    matrices = [p for n, p in plain.named_parameters() if p.dim() == 2 and "layers" in n]
    assert sum(p.numel() for p in matrices) <= bytes_in_8_bits(packed) < sum(p.nbytes for p in plain.parameters())
    length = plain.config.vocab_size
    mine, theirs = ((x[:length].float() - exact[:length]).abs().mean() for x in (scores, own))
    assert mine <= 1.2 * theirs
    undrafted = accelerated(loaded(tmp_path), "fast", threshold=1.0, target_weights="8bit")
    assert torch.equal(generate(undrafted)[0], text)


@pytest.mark.parametrize(
    ("form", "weights"),
    slow_but(
        (("packed, by row", "8bit"), ("int8", "8bit"), ("int8 by group", "8bit"), ("int8", "model")),
        itertools.product(FORMATS, ("8bit", "model")),
    ),
)
def test_the_text_is_the_plain_models(tmp_path, form, weights):
    """In float32, where nothing else is rounded."""
    exact = written(tmp_path, *FORMATS[form], torch.float32)
    expected, expected_scores = generate(loaded(tmp_path))
    assert torch.equal(generate(exact)[0], expected)
    text, scores = generate(accelerated(loaded(tmp_path), "exact", target_weights=weights))
    assert torch.equal(text, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)


def test_layers_of_their_own_are_refused_with_the_way_to_load_them(tmp_path):
    written(tmp_path, "pack-quantized")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    fix = r"q_proj is a layer of compressed-tensors, .*CompressedTensorsConfig\(dequantize=True\)"
    with pytest.raises(OptionError, match=f"Cannot accelerate this LlamaForCausalLM: .*{fix}"):
        accelerate(model)
    model.compile(backend="river", options={"on_unsupported": "raise"})
    with pytest.raises(UnsupportedGraphError, match=fix):
        generate(model)
