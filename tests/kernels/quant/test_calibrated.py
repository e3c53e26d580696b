"""Calibrated grids: each step against its definition in float64, and the gain of each quantizer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.quant import calibrated, fit
from river_compile.kernels.quant.calibrated import (
    BLOCK,
    RowMoments,
    WholeCompensation,
    WholeMoments,
    awq,
    gptq,
    inverse_factor,
    output_sqnr_db,
    quantize_observed,
    round_compensating,
)
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.fit import fit_grid, round_to_grid
from tests.kernels.quant.observed import damped, drawn
from tests.support.examples import examples

seeds = st.integers(0, 2**31)


def rounded_by_definition(weight, scale, zero, group_of, moments):
    """Optimal brain surgeon: recomputes the inverse over the remaining columns after each column."""
    weight, q = weight.clone(), torch.empty_like(weight)
    for j in range(weight.shape[1]):
        s, z = scale[:, group_of[j]], zero[:, group_of[j]]
        q[:, j] = ((weight[:, j] - z) / s).round().clamp(-8, 7)
        error = weight[:, j] - (q[:, j] * s + z)
        inverse = torch.linalg.inv(moments[j:, j:])
        weight[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return (q + 8).to(torch.uint8)


@pytest.mark.parametrize("k", [32, 64, 160])
@examples(5)
@given(seed=seeds)
def test_rounding_with_compensation_is_what_its_definition_says(k, seed):
    """In float64, also for several blocks of columns."""
    weight, _, moments = drawn(seed, n=3, k=k)
    moments = damped(moments, 0.05)
    scale, zero = fit_grid(weight.float(), 32, moments.diagonal().float())
    scale, zero = scale.double(), zero.double()
    order = torch.randperm(k, generator=torch.Generator().manual_seed(seed))
    weight, moments, group_of = weight[:, order], moments[order][:, order], order // 32
    columns = (tensor.T.contiguous() for tensor in (weight, scale, zero))
    found = round_compensating(*columns, group_of, WholeCompensation(inverse_factor(moments)))
    assert torch.equal(found.T, rounded_by_definition(weight, scale, zero, group_of, moments))


@given(st.integers(1, 3 * BLOCK), st.integers(1, 40), st.floats(0.01, 2.0), seeds)
@examples(20)
def test_a_few_inputs_say_what_their_moments_say(features, tokens, damping, seed):
    """The same U, errors, squares and energy, in float64."""
    weight, x, moments = drawn(seed, n=3, k=features, tokens=tokens)
    whole, rows = WholeMoments(moments), RowMoments(x)
    order = torch.randperm(features, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(rows.diagonal, whole.diagonal)
    assert rows.energy(weight) == pytest.approx(whole.energy(weight))
    assert rows.added(damping) == pytest.approx(whole.added(damping))
    of_both = [of.compensation(damping, order) for of in (whole, rows)]
    left = weight.T.contiguous()
    carried = [left.clone(), left.clone()]
    carries = [compensation.carrier(own) for compensation, own in zip(of_both, carried, strict=True)]
    errors = torch.randn(left.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for start in range(0, features, BLOCK):
        block = slice(start, start + BLOCK)
        torch.testing.assert_close(of_both[1].inside(block), of_both[0].inside(block))
        for carry in carries:
            carry(block, errors[block])
        torch.testing.assert_close(carried[1][block], carried[0][block])
    torch.testing.assert_close(*carried[::-1])


@given(seeds)
@examples(10)
def test_scale_and_zero_solve_the_weighted_least_squares(seed):
    """Against the normal equations in float64, group by group."""
    g = torch.Generator().manual_seed(seed)
    groups = torch.randn(2, 3, 32, generator=g, dtype=torch.float64)
    importance = torch.rand(1, 3, 32, generator=g, dtype=torch.float64)
    importance = importance / importance.sum(-1, keepdim=True)
    scale, zero = torch.full((2, 3), 0.4, dtype=torch.float64), torch.full((2, 3), 0.1, dtype=torch.float64)
    solved = fit._least_squares(groups, scale, zero, importance)
    q = ((groups - 0.1) / 0.4).round().clamp(-8, 7)
    for n in range(2):
        for i in range(3):
            root = importance[0, i].sqrt()
            design = torch.stack([q[n, i], torch.ones(32, dtype=torch.float64)], 1) * root[:, None]
            expected = torch.linalg.lstsq(design, (groups[n, i] * root)[:, None]).solution[:, 0]
            torch.testing.assert_close(torch.stack([solved[0][n, i], solved[1][n, i]]), expected)


@given(seeds)
@examples(10)
def test_each_step_errs_less_on_the_outputs_than_the_one_before(seed):
    """Nearest, weighted fit, AWQ; and GPTQ against its fit."""
    weight, _, moments = drawn(seed, n=32, k=128, tokens=400, dtype=torch.float32)
    fitted, moments = round_to_grid(weight, 64, moments.diagonal()).dequantize(), WholeMoments(moments)
    grid, scale = awq(weight, 64, moments)
    scaled = grid.dequantize() if scale is None else grid.dequantize() / scale
    compensated = gptq(weight, 64, moments).dequantize()
    ratios = [
        output_sqnr_db(weight, approximation, moments)
        for approximation in (quantize(weight, 64, "rtn").dequantize(), fitted, scaled)
    ]
    assert ratios == sorted(ratios)
    assert output_sqnr_db(weight, compensated, moments) > ratios[1]


def test_awq_scales_where_few_inputs_are_large():
    """Eight features carry nearly all of the signal."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    squares = torch.ones(128)
    squares[::16] = 400.0
    moments = WholeMoments(squares.diag())
    grid, scale = awq(weight, 64, moments)
    assert scale is not None
    assert (scale[::16] > scale[1]).all()
    unscaled = round_to_grid(weight, 64, squares).dequantize()
    gained = output_sqnr_db(weight, grid.dequantize() / scale, moments) - output_sqnr_db(weight, unscaled, moments)
    assert gained > 1


def test_gptq_of_independent_inputs_rounds_to_nearest():
    """No other input can compensate for an error."""
    weight = drawn(0, dtype=torch.float32)[0]
    squares = torch.linspace(0.5, 2, 64)
    importance = squares + calibrated.DAMPING * squares.mean()
    assert torch.equal(gptq(weight, 32, WholeMoments(squares.diag())).q, round_to_grid(weight, 32, importance).q)


@pytest.mark.parametrize("quantizer", ["awq", "gptq"])
class TestAnyQuantizer:
    def test_the_grid_is_one_that_a_kernel_stores(self, quantizer):
        """Storing the rounded scale and zero-point in bfloat16 is exact."""
        weight, _, moments = drawn(3, n=16, k=128, dtype=torch.float32)
        grid, _ = quantize_observed(weight, 32, quantizer, WholeMoments(moments), torch.bfloat16)
        assert torch.equal(grid.rounded(torch.bfloat16).dequantize(), grid.dequantize())
        assert (grid.q.dtype, grid.shape, grid.scale.shape) == (torch.uint8, weight.shape, (16, 4))
        assert 0 <= int(grid.q.min()) < int(grid.q.max()) <= 15

    @pytest.mark.parametrize("value", [0.0, 1.0, -0.25])
    def test_a_constant_group_is_exact(self, quantizer, value):
        weight, _, moments = drawn(4, n=4, k=64, dtype=torch.float32)
        weight[1, :32] = value
        alone = WholeMoments(moments.diagonal().diag())
        grid, scale = quantize_observed(weight, 32, quantizer, alone, may_scale=False)
        assert scale is None
        assert torch.equal(grid.dequantize()[1, :32], weight[1, :32])

    def test_inputs_that_are_never_anything_but_zero(self, quantizer):
        """A dead feature, a dead group, and only dead features."""
        weight, _, moments = drawn(5, n=4, k=64, dtype=torch.float32)
        for dead in (slice(3, 4), slice(0, 32), slice(0, 64)):
            some = moments.clone()
            some[dead], some[:, dead] = 0, 0
            grid, scale = quantize_observed(weight, 32, quantizer, WholeMoments(some))
            stands_for = grid.dequantize() if scale is None else grid.dequantize() / scale
            assert (weight - stands_for).abs().max() < 1

    def test_moments_that_do_not_fit_are_refused(self, quantizer):
        with pytest.raises(ValueError, match="finite and of 64 features; these are of 32"):
            quantize_observed(torch.zeros(4, 64), 32, quantizer, WholeMoments(torch.eye(32)))
        for moments in (WholeMoments(torch.full((64, 64), math.nan)), RowMoments(torch.full((2, 64), math.inf))):
            with pytest.raises(ValueError, match="finite"):
                quantize_observed(torch.zeros(4, 64), 32, quantizer, moments)
        with pytest.raises(ValueError, match="group_size=48"):
            quantize_observed(torch.zeros(4, 64), 48, quantizer, WholeMoments(torch.eye(64)))


def test_an_unknown_quantizer_is_refused():
    with pytest.raises(ValueError, match="quantizer='hqq' is not allowed; choose one of 'gptq', 'awq'"):
        quantize_observed(torch.zeros(4, 64), 32, "hqq", WholeMoments(torch.eye(64)))


def test_the_ratio_of_outputs_is_that_of_the_outputs():
    weight, x, moments = drawn(6)
    approximation = quantize(weight, 32, "rtn").dequantize(torch.float64)
    outputs, wrong = x @ weight.T, x @ approximation.T
    expected = 10 * math.log10(outputs.square().sum() / (outputs - wrong).square().sum())
    for known in (WholeMoments(moments.float()), RowMoments(x.float())):
        assert output_sqnr_db(weight, approximation, known) == pytest.approx(expected, abs=1e-3)
        assert output_sqnr_db(weight, weight, known) == math.inf
        assert output_sqnr_db(torch.zeros(2, 64), torch.ones(2, 64), known) == -math.inf
