"""Quantizers: the grid, its error, constant and extreme groups, and the contract with torchao's solver."""

import inspect
import math

import pytest
import torch

from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.grid import QuantizedWeight, fitting_group_size, sqnr_db


def matrix(n: int = 16, k: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) / 16


def test_the_grid_is_scale_and_zero_around_8():
    q = torch.tensor([[0, 8, 15, 8]], dtype=torch.uint8)
    weight = QuantizedWeight(q, torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -1.0]]), 2)
    assert weight.dequantize().tolist() == [[-3.0, 1.0, 13.0, -1.0]]


@pytest.mark.parametrize("quantizer", ["rtn", "hqq", "mse"])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_noise_of_a_normal_matrix(quantizer, group):
    weight = matrix()
    quantized = quantize(weight, group, quantizer)
    assert (quantized.q.dtype, quantized.q.shape) == (torch.uint8, weight.shape)
    assert quantized.scale.shape == quantized.zero.shape == (16, 256 // group)
    assert int(quantized.q.max()) <= 15
    assert 17 < sqnr_db(weight, quantized.dequantize()) < 28


def test_rounding_to_nearest_errs_by_half_a_step_at_most():
    weight = matrix()
    quantized = quantize(weight, 64, "rtn")
    step = quantized.scale.repeat_interleave(64, dim=1)
    assert ((weight - quantized.dequantize()).abs() <= step * 0.5001).all()


def test_hqq_has_less_noise_where_outliers_stretch_the_grid():
    weight = matrix(seed=1)
    weight[:, ::50] *= 8
    errors = {q: (weight - quantize(weight, 64, q).dequantize()).abs().pow(0.7).mean().item() for q in ("rtn", "hqq")}
    assert errors["hqq"] < errors["rtn"]


@pytest.mark.parametrize("group", [32, 64, 128])
def test_mse_has_the_least_squared_error(group):
    weight = matrix(seed=2)
    loss = {q: -sqnr_db(weight, quantize(weight, group, q).dequantize()) for q in ("rtn", "hqq", "mse")}
    assert loss["mse"] < min(loss["rtn"], loss["hqq"])


@pytest.mark.parametrize("quantizer", ["rtn", "hqq"])
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-8, 1e30])
def test_a_constant_group_is_exact(quantizer, value):
    weight = torch.full((2, 128), value)
    weight[1, 64:] = torch.linspace(-1, 1, 64)
    quantized = quantize(weight, 64, quantizer)
    assert torch.equal(quantized.dequantize()[0], weight[0])
    assert torch.equal(quantized.dequantize()[1, :64], weight[1, :64])
    assert torch.isfinite(quantized.scale).all()


@pytest.mark.parametrize(
    ("weight", "group", "quantizer", "message"),
    [
        (torch.zeros(2, 64), 48, "rtn", "group_size=48"),
        (torch.zeros(2, 64), 0, "rtn", "group_size=0"),
        (torch.zeros(64), 64, "rtn", "2 dimensions"),
        (torch.zeros(2, 64), 64, "gptq", "quantizer='gptq'"),
        (torch.full((2, 64), math.nan), 64, "hqq", "infinite or NaN"),
    ],
)
def test_what_is_refused(weight, group, quantizer, message):
    with pytest.raises(ValueError, match=message):
        quantize(weight, group, quantizer)


@pytest.mark.parametrize(
    ("features", "requested", "fitting"), [(576, 128, 64), (4096, 128, 128), (96, 100, 32), (7, 64, 1)]
)
def test_fitting_group_size(features, requested, fitting):
    assert fitting_group_size(features, requested) == fitting


def test_signal_to_noise_at_its_ends():
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr_db(torch.ones(4), torch.full((4,), 1.1)) == pytest.approx(20.0, abs=1e-4)


def test_contract_with_torchao():
    """The private solver's arguments, and its results: w = (q - 8) scale + zero."""
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq as solve

    assert {"nbits", "group_size", "axis", "compute_dtype", "device"} <= set(inspect.signature(solve).parameters)
    weight = matrix(4, 128)
    q, scale, zero, _ = solve(weight, nbits=4, group_size=64, axis=1, compute_dtype=torch.float32, device="cpu")
    assert set(q.unique().tolist()) <= set(range(16))
    grid = QuantizedWeight(q.reshape(4, 128).to(torch.uint8), scale.reshape(4, 2), zero.reshape(4, 2), 64)
    assert sqnr_db(weight, grid.dequantize()) > 17
