"""Grids fitted in C++, on every instruction set of this machine: against float64 and PyTorch's code."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import build
from river_compile.kernels.native import load as native
from river_compile.kernels.quant import calibrated, fit
from river_compile.kernels.quant.calibrated import WholeCompensation, WholeMoments, inverse_factor
from river_compile.kernels.quant.mxfp4 import find_mxfp4, unpack_mxfp4
from tests.kernels.native.running import EACH_ISA
from tests.kernels.quant.observed import damped, drawn

seeds = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(params=EACH_ISA, autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("RIVER_COMPILE_ISA", request.param.name)


def in_pytorch(function, *arguments):
    with patch.object(native, "can_pack", return_value=False):
        return function(*arguments)


@given(seeds, st.integers(1, 70), st.sampled_from([32, 96, 160]))
def test_each_column_is_rounded_to_nearest_after_all_before_it_were_made_up_for(seed, n, k):
    """Follows the integers column by column in float64."""
    weight, _, moments = drawn(seed, n=n, k=k)
    moments = damped(moments, 0.05)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    scale, zero = fit.fit_grid(weight.float(), 32, moments.diagonal().float())
    group_of = order // 32
    factor = inverse_factor(moments[order][:, order])
    left = weight[:, order]
    columns = (tensor.T.contiguous() for tensor in (left.float(), scale, zero))
    found = calibrated.round_compensating(*columns, group_of, WholeCompensation(factor.float())).T.double() - 8
    scale, zero = scale.double()[:, group_of], zero.double()[:, group_of]
    for j in range(k):
        exact = ((left[:, j] - zero[:, j]) / scale[:, j]).clamp(-8, 7)
        assert (found[:, j] - exact).abs().max() < 0.5 + 1e-3
        error = left[:, j] - (found[:, j] * scale[:, j] + zero[:, j])
        left[:, j:] -= error[:, None] * factor[j, j:] / factor[j, j]


def noise_of(weight, grid, importance, group_size):
    scale, zero = (tensor.double()[..., None] for tensor in grid)
    groups = weight.double().unflatten(1, (-1, group_size))
    q = ((groups - zero) / scale).round().clamp(-8, 7)
    return ((q * scale + zero - groups).square() * importance.double().reshape(1, -1, group_size)).sum(-1)


@given(seeds, st.integers(1, 5), st.sampled_from([16, 32, 64, 128]), DTYPES, st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_fitted_grid_is_as_good_as_pytorchs(seed, n, group_size, dtype, size):
    """Group by group in float64; of two grids of equal noise either may be chosen."""
    g = torch.Generator().manual_seed(seed)
    weight = size * torch.randn(n, 2 * group_size, generator=g)
    importance = torch.rand(2 * group_size, generator=g)
    importance[torch.rand(2 * group_size, generator=g) < 0.2] = 0
    found = fit.fit_grid(weight, group_size, importance, dtype)
    expected = in_pytorch(fit.fit_grid, weight, group_size, importance, dtype)
    noises = [noise_of(weight, grid, importance, group_size) for grid in (found, expected)]
    torch.testing.assert_close(*noises, rtol=2e-3, atol=1e-9 * size**2)
    for tensor in found:
        assert torch.equal(tensor, tensor.to(dtype).float())


@given(seeds, st.integers(1, 9), st.integers(1, 5))
def test_mxfp4_is_found_by_its_values(seed, n, groups):
    """One other value, and there is none."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 256, (n, groups, 16), generator=g, dtype=torch.uint8)
    weight = unpack_mxfp4(blocks, torch.randint(100, 140, (n, groups), generator=g, dtype=torch.uint8))
    found = find_mxfp4(weight)
    assert found is not None
    assert torch.equal(unpack_mxfp4(*found).view(torch.int16), weight.view(torch.int16))
    row, column = seed % n, seed % (32 * groups)
    weight[row, column] = weight[row, column // 32 * 32 :][:32].abs().max() * 1.0625 + 2.0**-40
    assert find_mxfp4(weight) is None


def test_constant_groups_are_the_point_in_the_middle():
    weight = torch.tensor([0.0, 1.5, -3e38, 1e-39]).repeat_interleave(32)[None]
    for dtype in (torch.float32, torch.bfloat16):
        scale, zero = native.fit_grid(weight, 32, torch.full((128,), 1 / 32), dtype)
        assert torch.equal(scale, torch.ones(1, 4))
        assert torch.equal(zero, weight[:, ::32].to(dtype).float())


def test_gptq_takes_these_functions(monkeypatch):
    called = []
    for name in ("fit_grid", "round_block"):
        real = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *a, name=name, real=real: called.append(name) or real(*a))
    weight, _, moments = drawn(0, n=4, dtype=torch.float32)
    calibrated.gptq(weight, 32, WholeMoments(moments))
    assert called == ["fit_grid", "round_block"]


def test_what_they_do_not_take_is_left_to_pytorch():
    weight = torch.zeros(2, 96)
    assert native.can_pack(weight, 32, torch.bfloat16)
    assert not native.can_pack(torch.zeros(2, 256), 256)
    assert not native.can_pack(weight, 32, torch.float16)
    assert not native.can_pack(weight.double())
    assert not native.can_pack(weight.to("meta"))


def test_without_a_compiler_pytorch_does_it(monkeypatch):
    def none(isa):
        raise build.CannotBuild(f"no compiler for {isa.name}")

    monkeypatch.setattr(native, "packing_library", none)
    native._packing.cache_clear()
    try:
        assert not native.can_pack(torch.zeros(2, 64))
        weight, _, moments = drawn(0, n=4, dtype=torch.float32)
        assert calibrated.gptq(weight, 32, WholeMoments(moments)).q.shape == (4, 64)
    finally:
        native._packing.cache_clear()
