"""Backbones that were quantized before: torchao's weights of 8 bits, and what a file in Q8_0 is loaded to."""

from __future__ import annotations

import warnings

import pytest
import torch

import river_compile
from river_compile import report
from river_compile.errors import OptionError
from river_compile.kernels.native.build import choose_isa
from river_compile.kernels.quant import lossless
from tests.lowering.test_packed_backbone import DOWN, generate
from tests.support.families import each, make

torchao = pytest.importorskip("torchao.quantization")
pytestmark = [
    pytest.mark.skipif(choose_isa().name == "portable", reason="needs vectors"),
    pytest.mark.filterwarnings("ignore::river_compile.RiverWarning"),
]
CONFIGS = ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")


def quantized(family="llama", config=CONFIGS[0]):
    model = make(family, layers=2, dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, getattr(torchao, config)())
    return model


def accelerated(model, quality="exact", **options):
    options = {"strict": quality == "exact", **options}
    return river_compile.accelerate(model, quality, quantizer="rtn", group_size=32, kernels="native", **options)


def dequantized(model):
    """The same model with the values of its weights in float32."""
    model = model.to(torch.float32)
    for name, parameter in list(model.named_parameters()):
        if lossless.torchao_parts(parameter) is not None:
            module = model.get_submodule(name.rpartition(".")[0])
            values = lossless.dequantize_8bit(*lossless.pack_8bit([parameter]))
            module.weight = torch.nn.Parameter(values, requires_grad=False)
    return model


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", each(("qwen2", "llama", "gemma2", "phi3")))
def test_torchaos_weights_are_read_as_they_are(family, config):
    """Scores are as near to those of the values in float32 as torchao's own; drafts change no text."""
    model = quantized(family, config)
    own, exact = generate(model)[1], generate(dequantized(quantized(family, config)))[1]
    text, scores = generate(accelerated(model))
    assert all(graph["lossless_bytes"] for graph in report(model).to_dict()["graphs"])
    length = make(family, layers=2).config.vocab_size
    mine, theirs = ((x[:length].float() - exact[:length]).abs().mean() for x in (scores, own))
    assert mine <= 2 * theirs  # (a wrong integer or scale is more than ten times that)
    plain = accelerated(quantized(family, config), "fast", threshold=1.0)
    assert torch.equal(generate(plain)[0], text)


@torch.no_grad()
def test_scales_that_change_count():
    model = accelerated(quantized())
    before = generate(model)
    model.get_submodule(DOWN).weight.scale.mul_(-1)
    fresh = quantized()
    fresh.get_submodule(DOWN).weight.scale.mul_(-1)
    after = generate(model)
    assert all(map(torch.equal, after, generate(accelerated(fresh))))
    assert not torch.equal(before[1], after[1])


@torch.no_grad()
def as_of_q8_0(model):
    """Rounds a float32 model's matrices as GGUF's Q8_0 does."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
            grouped = parameter.unflatten(1, (-1, 32))
            scale = (grouped.abs().amax(-1, keepdim=True) / 127).half().float()
            q = (grouped / scale).round()
            q[q.abs() == q.abs().amax(-1, keepdim=True)] = 127
            parameter.copy_((q * scale).flatten(1))
    return model


@pytest.mark.parametrize("family", each(("llama", "qwen2", "gemma2")))
def test_what_a_file_in_q8_0_is_loaded_to_has_the_text_of_its_float32(family):
    """A prompt in float32 is a library's, so scores differ by rounding."""
    models = [as_of_q8_0(make(family, layers=2)) for _ in range(2)]
    packed, plain = (
        accelerated(model, target_weights=weights) for model, weights in zip(models, ("8bit", "model"), strict=True)
    )
    (text, scores), (expected, expected_scores) = generate(packed), generate(plain)
    assert torch.equal(text, expected)
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)
    size = sum(p.numel() for n, p in models[0].named_parameters() if p.dim() == 2 and "embed" not in n)
    for graph in report(packed).to_dict()["graphs"]:
        assert graph["lossless_bytes"] >= 0.9 * size


def test_a_file_in_q8_0_may_be_loaded_in_16_bits():
    """Scores are as near to those of its values as the plain model's, whose weights are rounded."""
    exact, plain, packed = (as_of_q8_0(make("llama", layers=2)) for _ in range(3))
    scores = [
        generate(model)[1][: exact.config.vocab_size].float()
        for model in (exact, plain.bfloat16(), accelerated(packed.bfloat16(), target_weights="8bit"))
    ]
    size = sum(p.numel() for n, p in packed.named_parameters() if p.dim() == 2 and "layers" in n)
    assert all(graph["lossless_bytes"] >= size for graph in report(packed).to_dict()["graphs"])
    theirs, mine = ((scores[i] - scores[0]).abs().mean() for i in (1, 2))
    assert mine <= 2 * theirs  # (a wrong integer or scale is more than ten times that)


@torch.no_grad()
def test_a_matrix_is_packed_by_what_it_is_when_a_text_begins():
    """One that leaves its integers is read as it is from then on; one that was none of 8 bits may become so."""
    models = [as_of_q8_0(make("llama", layers=2)) for _ in range(2)]
    for model in models:
        weight = model.get_submodule(DOWN).weight
        weight.mul_(torch.linspace(0.5, 1.5, weight.shape[1]))
    packed, plain = (accelerated(models[i], target_weights=how) for i, how in enumerate(("8bit", "model")))
    assert torch.equal(generate(packed)[0], generate(plain)[0])
    for model in models:
        model.get_submodule(DOWN).weight.copy_(model.model.layers[0].mlp.down_proj.weight)
    assert torch.equal(generate(packed)[0], generate(plain)[0])
    for model in models:
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-4
    assert torch.equal(generate(packed)[0], generate(plain)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_weights_are_no_such_file(dtype):
    with pytest.raises(OptionError, match="target_weights='8bit' requires weights that are 8-bit numbers"):
        generate(accelerated(make("llama", layers=2, dtype=dtype), target_weights="8bit"))
