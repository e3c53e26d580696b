"""Models whose backbone is quantized already: twins of their values, or a refusal that says why."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from river_compile import report
from river_compile.backend import river
from river_compile.errors import OptionError, UnsupportedGraphError
from tests.support.decoding import decode, new_cache
from tests.support.families import make
from tests.support.lowerings import OPERATORS, UNQUANTIZED

torchao = pytest.importorskip("torchao.quantization")
OPTIONS = {"kernels": OPERATORS, "quantizer": "rtn", "group_size": 32, "first_exit": 1, "threshold": -1.0}


@pytest.fixture(scope="module", params=["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def quantized(request):
    """A model with torchao's tensors as weights."""
    model = make("llama", layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchao.quantize_(model, getattr(torchao, request.param)())
    return model


@pytest.mark.filterwarnings("ignore::river_compile.RiverWarning")
def test_twins_of_torchao_tensors(quantized):
    """Full depth has the bits of the traced model (tracing changes those of torchao's products); twins are made from
    the values, and follow them when they change."""
    quantized.compile(backend="eager")
    plain = decode(quantized, new_cache(quantized, "static"), [None, None], plain_prompt=True)
    quantized.compile(backend=river, options=OPTIONS)
    assert all(map(torch.equal, decode(quantized, new_cache(quantized, "static"), [2, 2], plain_prompt=True), plain))
    river_logits = decode(quantized, new_cache(quantized, "static"), [0, 0], plain_prompt=True)
    for mine, expected in zip(river_logits[1:], plain[1:], strict=True):
        assert torch.nn.functional.cosine_similarity(mine.flatten(), expected.flatten(), dim=0) > 0.9
        assert not torch.equal(mine, expected)
    name = "model.layers.1.mlp.down_proj"
    site = next(site for site in report(quantized).packed if site.name == name)
    layer = quantized.get_submodule(name)
    torch.testing.assert_close(site.dequantize(), layer.weight.dequantize(), rtol=0, atol=0.1)
    with torch.no_grad():
        layer.weight.scale.mul_(-1)
    decode(quantized, new_cache(quantized, "static"), [0], plain_prompt=True)
    site = next(site for site in report(quantized).packed if site.name == name)
    torch.testing.assert_close(site.dequantize(), layer.weight.dequantize(), rtol=0, atol=0.1)


def test_torchao_tensors_cannot_be_offloaded(quantized):
    quantized.compile(backend=river, options={**OPTIONS, "offload": 1, "exit_depth": 1})
    with pytest.raises(OptionError, match=r"offload=1 is not available for weights of type Int8Tensor, such as "):
        decode(quantized, new_cache(quantized, "static"), [None], plain_prompt=True)


class PackedLinear(nn.Module):
    """What GPTQ, AWQ and bitsandbytes put in a linear layer's place: integers, of which the product makes floats."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        self.register_buffer("qweight", (linear.weight.detach() / scale).round().to(torch.int32))
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x @ (self.qweight.to(x.dtype) * self.scale).T


def test_layers_that_unpack_their_own_integers_are_refused_by_name():
    """A twin of such a block would be the block: nothing would be gained, and nothing said."""
    model = make("llama", layers=2)
    for name, linear in list(model.model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.set_submodule(name, PackedLinear(linear))
    model.compile(backend=river, options={**OPTIONS, "on_unsupported": "raise"})
    words = r"no linear layer with plain weights \(.*qweight is torch.int32 \[.*bitsandbytes.*loaded in 16 bits \(at "
    with pytest.raises(UnsupportedGraphError, match=words):
        decode(model, new_cache(model, "static"), [None], plain_prompt=True)
    model.compile(backend=river, options={**OPTIONS, "kernels": UNQUANTIZED})
    decode(model, new_cache(model, "static"), [0], plain_prompt=True)
    assert report(model).graphs[-1].refusal == ""
