"""Weights of 8 bits: what torchao and files in Q8_0 hold comes back as it was, and nothing else is taken for them."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.quant import bits8
from tests.support.examples import examples


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**20))
@examples(30)
def test_what_a_file_in_q8_0_gives_comes_back_to_the_bit(n, groups, seed):
    """Groups of zeros and scales of any size among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, groups, 32, generator=g) * 10 ** torch.randint(-4, 4, (n, groups, 1), generator=g)
    x[torch.rand(n, groups, generator=g) < 0.1] = 0
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    q = (x / scale.where(scale > 0, 1.0)).round().clamp(-127, 127)
    weight = (q * scale).flatten(1)
    if (q.abs().amax(-1) < 127)[scale.squeeze(-1) > 0].any():
        return  # (a scale that float16 rounded up has no 127, and quantizers of GGUF make no such group)
    packed = bits8.pack([weight])
    assert packed is not None
    assert packed[0].dtype == torch.int8
    assert packed[1].shape == (n, groups)
    assert torch.equal(bits8.dequantize(*packed), weight)


@pytest.mark.parametrize("weight", [torch.randn(4, 64), torch.ones(4, 60), torch.ones(4, 64).bfloat16()])
def test_other_matrices_are_not_taken_for_it(weight):
    assert bits8.pack([weight]) is None


class TestTorchao:
    torchao = pytest.importorskip("torchao.quantization")

    def layer(self, config: str, **options) -> torch.nn.Linear:
        layer = torch.nn.Linear(64, 48, bias=False).bfloat16()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.torchao.quantize_(layer, getattr(self.torchao, config)(**options))
        return layer

    @pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
    def test_weight_only_tensors_keep_their_values(self, config):
        layers = [self.layer(config) for _ in range(2)]
        qweight, scale = bits8.pack([layer.weight for layer in layers])
        values = bits8.dequantize(qweight, scale)
        assert torch.equal(values.bfloat16(), torch.cat([layer.weight.dequantize() for layer in layers]))
        layers[0].weight.qdata.zero_()
        assert torch.equal(bits8.dequantize(qweight, scale), values), "it is a copy"

    def test_of_two_kinds_they_are_no_matrix(self):
        kinds = [self.layer(config).weight for config in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")]
        assert bits8.pack(kinds) is None

    def test_what_has_zero_points_or_no_numbers_is_left_alone(self):
        shifted, broken = self.layer("Int8WeightOnlyConfig").weight, self.layer("Float8WeightOnlyConfig").weight
        shifted.zero_point.add_(1)
        broken.qdata.view(torch.uint8)[3, 5] = 0xFF
        assert bits8.pack([shifted]) is bits8.pack([broken]) is None

    def test_weights_whose_activations_are_quantized_too_are_others(self):
        assert bits8.held_by(self.layer("Int8DynamicActivationInt8WeightConfig").weight) is None
        assert bits8.held_by(torch.ones(3, 3)) is None
