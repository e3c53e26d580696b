"""Twins in one reading, on every instruction set of this machine: against the quantizer and the packing one by one."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load as native
from river_compile.kernels.quant import quick
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.grid import QuantizedWeight, sqnr_db
from river_compile.kernels.quant.layouts import pack
from tests.kernels.native.running import EACH_ISA

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=EACH_ISA, autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("RIVER_COMPILE_ISA", request.param.name)


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 16).to(dtype)


@given(
    st.integers(0, 2**31),
    st.integers(1, 40),
    st.integers(1, 3),
    st.sampled_from((32, 64, 128)),
    st.sampled_from(DTYPES),
)
def test_each_weight_is_at_the_nearest_point_of_a_grid_as_good_as_pytorchs(seed, n, groups, group, dtype):
    weight = drawn(seed, n, groups * group, dtype=dtype)
    packed, sqnr = quick.pack_mse(weight, group)
    grid = packed.unpack()
    scale, zero = (part.double().repeat_interleave(group, dim=1) for part in (grid.scale, grid.zero))
    off = (weight.double() - zero) / scale - (grid.q.double() - 8)
    inside = (grid.q > 0) & (grid.q < 15)
    assert (off[inside].abs() <= 0.5001).all()
    assert (off[grid.q == 0] <= 0.5001).all()
    assert (off[grid.q == 15] >= -0.5001).all()
    with patch.object(native, "can_pack", return_value=False):
        expected = quantize(weight, group, "mse")
    assert sqnr_db(weight, grid.dequantize(torch.float64)) == pytest.approx(sqnr, abs=1e-3)
    assert sqnr == pytest.approx(sqnr_db(weight, expected.dequantize(torch.float64)), abs=0.02)
    again = pack(QuantizedWeight(grid.q, grid.scale, grid.zero, group), "native")  # missing rows are zeros
    assert torch.equal(packed.qweight, again.qweight)
    assert torch.equal(packed.scale_zero.view(torch.int16), again.scale_zero.view(torch.int16))


def test_a_stack_has_the_bytes_of_its_matrices_however_they_lie():
    stack = drawn(0, 3, 128, 20).mT
    packed, sqnr = quick.pack_mse(stack, 64)
    assert packed.experts == 3
    for i, matrix in enumerate(stack):
        alone, _ = quick.pack_mse(matrix.contiguous(), 64)
        assert torch.equal(packed.matrix(i).qweight, alone.qweight)
        assert torch.equal(packed.matrix(i).scale_zero, alone.scale_zero)
    assert sqnr == pytest.approx(sqnr_db(stack.flatten(0, 1), packed.dequantize()), abs=1e-3)


def test_threads_change_no_byte(monkeypatch):
    weight = drawn(1, 100, 64, dtype=torch.bfloat16)
    whole, sqnr = quick.pack_mse(weight, 32)
    monkeypatch.setattr(quick, "_ELEMENTS", 64 * 32)
    parts, of_parts = quick.pack_mse(weight, 32)
    assert torch.equal(whole.qweight, parts.qweight)
    assert torch.equal(whole.scale_zero, parts.scale_zero)
    assert of_parts == pytest.approx(sqnr)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_grid_fits_infinite_weights(value):
    weight = drawn(2, 20, 64)
    weight[17, 3] = value
    with pytest.raises(ValueError, match="infinite or NaN"):
        quick.pack_mse(weight, 64)


def test_which_weights_are_packed_at_once():
    assert quick.can_pack_mse(drawn(0, 4, 64), 64, "native")
    assert quick.can_pack_mse(drawn(0, 2, 4, 64), 32, "native")
    assert not quick.can_pack_mse(drawn(0, 4, 64), 64, "plain")
    assert not quick.can_pack_mse(drawn(0, 4, 64), 16, "native")
    assert not quick.can_pack_mse(drawn(0, 4, 80), 32, "native")
    assert not quick.can_pack_mse(drawn(0, 4, 64, dtype=torch.float64), 64, "native")
