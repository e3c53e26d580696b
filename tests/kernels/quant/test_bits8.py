"""8-bit weights of torchao and of files are recovered exactly, and others are left alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.quant import lossless
from tests.support.examples import examples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**20))
@examples(30)
def test_what_a_file_in_q8_0_gives_comes_back_to_the_bit(n, groups, seed):
    """With groups of zeros and scales of any size."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, groups, 32, generator=g) * 10 ** torch.randint(-4, 4, (n, groups, 1), generator=g)
    x[torch.rand(n, groups, generator=g) < 0.1] = 0
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    q = (x / scale.where(scale > 0, 1.0)).round().clamp(-127, 127)
    weight = (q * scale).flatten(1)
    if (q.abs().amax(-1) < 127)[scale.squeeze(-1) > 0].any():
        return  # (a scale that float16 rounded up has no 127, and quantizers of GGUF make no such group)
    packed = lossless.pack_8bit([weight])
    assert packed is not None
    assert packed[0].dtype == torch.int8
    assert packed[1].shape == (n, groups)
    assert torch.equal(lossless.dequantize_8bit(*packed), weight)


@given(
    n=st.integers(1, 12),
    groups=st.integers(1, 3),
    kind=st.sampled_from((torch.int8, torch.float8_e4m3fn)),
    group=st.sampled_from((None, 128, 64, 32)),
    dtype=st.sampled_from(DTYPES),
    of_scales=st.sampled_from(DTYPES),
    largest=st.sampled_from((127.5, 127, 120)),
    seed=st.integers(0, 2**20),
)
@examples(60)
def test_what_a_matrix_was_rounded_from_comes_back(n, groups, kind, group, dtype, of_scales, largest, seed):
    """The numbers exactly, and scales that round to the weight, the file's if those were short."""
    g = torch.Generator().manual_seed(seed)
    group = None if kind != torch.int8 else group
    shape = (n, groups, group) if group else (n, 1, 128 * groups + seed % 7)
    x = torch.randn(*shape, generator=g) * 0.02
    scale = (x.abs().amax(-1, keepdim=True) / (largest if kind == torch.int8 else 448)).to(of_scales).float()
    q = x / scale
    q = (q.round().clamp(-128, 127) if kind == torch.int8 else q.clamp(-448, 448).to(kind)).float()
    weight = (q * scale).to(dtype).flatten(1)
    qweight, found = lossless.pack_8bit([weight])
    assert qweight.dtype == kind
    assert torch.equal(qweight.float(), q.flatten(1))
    assert torch.equal(lossless.dequantize_8bit(qweight, found).to(dtype), weight)
    if group and groups > 1:
        assert torch.equal(found, found[:, :: group // 32].repeat_interleave(group // 32, 1))
    if of_scales == torch.bfloat16:
        assert torch.equal(found.unique(), scale.unique())


@pytest.mark.parametrize("dtype", DTYPES)
def test_other_matrices_are_not_taken_for_it(dtype):
    """Nor those with some 8-bit values or some 8-bit rows."""
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    weight[:20] = (weight[:20] * 60).round().clamp(-127, 127) / 64
    assert lossless.pack_8bit([weight.to(dtype)]) is None
    almost = ((weight * 60).round().clamp(-127, 127) / 64).to(dtype)
    assert lossless.pack_8bit([almost]) is not None
    almost[37, 250] = 0.0151
    assert lossless.pack_8bit([almost]) is None
    almost[37, 250] = torch.nan
    assert lossless.pack_8bit([almost]) is None
    assert lossless.pack_8bit([torch.ones(4, 64, dtype=torch.float64)]) is None


def test_rows_of_zeros_have_any_scale():
    weight = torch.zeros(40, 64)
    weight[::2] = torch.randint(-127, 128, (20, 64), generator=torch.Generator().manual_seed(0)) * 0.01
    weight[::2, 0] = 1.27
    assert torch.equal(lossless.dequantize_8bit(*lossless.pack_8bit([weight.bfloat16()])).bfloat16(), weight.bfloat16())


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
        qweight, scale = lossless.pack_8bit([layer.weight for layer in layers])
        values = lossless.dequantize_8bit(qweight, scale)
        assert torch.equal(values.bfloat16(), torch.cat([layer.weight.dequantize() for layer in layers]))
        layers[0].weight.qdata.zero_()
        assert torch.equal(lossless.dequantize_8bit(qweight, scale), values), "it is a copy"

    def test_of_two_kinds_they_are_no_matrix(self):
        kinds = [self.layer(config).weight for config in ("Int8WeightOnlyConfig", "Float8WeightOnlyConfig")]
        assert lossless.pack_8bit(kinds) is None

    def test_what_has_zero_points_or_no_numbers_is_left_alone(self):
        shifted, broken = self.layer("Int8WeightOnlyConfig").weight, self.layer("Float8WeightOnlyConfig").weight
        shifted.zero_point.add_(1)
        broken.qdata.view(torch.uint8)[3, 5] = 0xFF
        assert lossless.pack_8bit([shifted]) is lossless.pack_8bit([broken]) is None

    def test_weights_whose_activations_are_quantized_too_are_others(self):
        assert lossless.torchao_parts(self.layer("Int8DynamicActivationInt8WeightConfig").weight) is None
        assert lossless.torchao_parts(torch.ones(3, 3)) is None
