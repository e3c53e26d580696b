"""Layouts: unpacking inverts packing, each byte is as documented, padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.quant import layouts as pack
from river_compile.kernels.quant.grid import QuantizedWeight, sqnr_db
from tests.kernels.packing import pack_linear
from tests.support.examples import examples


def grid(n: int, k: int, group: int, seed: int = 0) -> QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), generator=g, dtype=torch.uint8)
    scale, zero = (torch.randn(n, k // group, generator=g).half().float() for _ in range(2))
    return QuantizedWeight(q, scale.abs() + 0.01, zero, group)


@given(
    st.sampled_from(("triton", "plain", "native")), st.integers(1, 9), st.integers(1, 5), st.sampled_from((32, 64, 128))
)
@examples(40)
def test_unpacking_inverts_packing(layout, n, groups, group):
    weight = grid(n, groups * group, group, seed=n)
    if layout != "plain":
        weight = weight.rounded(torch.bfloat16 if layout == "native" else pack.parameter_dtype(weight))
    packed = pack.pack(weight, layout)
    again = packed.unpack()
    assert torch.equal(again.q, weight.q)
    assert torch.equal(again.scale, weight.scale)
    assert torch.equal(again.zero, weight.zero)
    assert torch.equal(packed.dequantize(torch.float64), weight.dequantize(torch.float64))


def test_where_a_nibble_lies_in_the_triton_layout():
    weight = grid(1, 128, 64)
    packed = pack.pack(weight, "triton")
    assert (packed.qweight.dtype, packed.qweight.shape) == (torch.int32, (1, 16))
    for i, p, h in ((0, 0, 0), (7, 3, 0), (10, 3, 1), (15, 1, 1)):
        word = packed.qweight[0, i].item() & 0xFFFFFFFF
        assert word >> 16 * h + 4 * p & 15 == weight.q[0, 8 * i + 2 * p + h].item()


def test_where_a_nibble_lies_in_the_plain_layout():
    weight = grid(1, 64, 64)
    packed = pack.pack(weight, "plain")
    assert packed.scale_zero.shape == (1, 1, 2)
    assert packed.qweight[0, 5].item() == weight.q[0, 10].item() + 16 * weight.q[0, 11].item()


def test_where_a_nibble_lies_in_the_native_layout():
    weight = grid(20, 128, 64)
    packed = pack.pack(weight, "native")
    assert (packed.qweight.shape, packed.scale_zero.shape) == ((2, 2, 8, 64), (2, 2, 16, 2))
    for n, g, i, j in ((0, 0, 0, 0), (7, 0, 7, 3), (18, 1, 2, 1)):
        byte = packed.qweight[n // 16, g, i, 4 * (n % 16) + j].item()
        at = g * 64 + i * 8 + j
        assert byte == weight.q[n, at].item() + 16 * weight.q[n, at + 4].item()


@pytest.mark.parametrize("layout", ["triton", "plain", "native"])
@pytest.mark.parametrize("k", [1, 63, 64, 101])
def test_any_number_of_input_features(layout, k):
    weight = torch.randn(5, k, generator=torch.Generator().manual_seed(k))
    packed = pack_linear(weight, 64, layout, "rtn")
    assert (packed.in_features, packed.out_features) == (k, 5)
    assert packed.dequantize().shape == (5, k)
    assert sqnr_db(weight, packed.dequantize()) > 18


def test_parameters_beyond_float16_are_kept_in_bfloat16():
    weight = grid(2, 64, 64)
    assert pack.pack(weight, "triton").scale_zero.dtype == torch.float16
    for factor in (1e6, 1e-7):
        other = QuantizedWeight(weight.q, weight.scale * factor, weight.zero, 64)
        assert pack.pack(other, "triton").scale_zero.dtype == torch.bfloat16


def test_every_layout_and_size_that_is_refused():
    with pytest.raises(ValueError, match="layout='rows' is not allowed; choose one of 'triton', 'plain', 'native'"):
        pack.layout("rows")
    with pytest.raises(ValueError, match="group_size=16"):
        pack.pack(grid(1, 64, 16), "triton")
    with pytest.raises(ValueError, match="in_features=64"):
        pack.pack(grid(1, 128, 64), "triton", in_features=64)
