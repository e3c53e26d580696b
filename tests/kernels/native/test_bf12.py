"""C++ linears with 12-bit weights: the bits of 16-bit weights (test_linear.py), for any rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.quant import lossless
from tests.kernels.native.running import EACH_ISA, called, dense, native, same_bits
from tests.kernels.quant.test_bf12 import matrix
from tests.support.examples import examples

pytestmark = pytest.mark.usefixtures("restored")

WITH_VECTORS = pytest.mark.parametrize("isa", [each for each in EACH_ISA if each.id != "portable"])


def in_12_bits(x, weight, bias=None, **around):
    return packed(x, *lossless.pack_12bit(weight), bias, len(weight), **around)


def packed(x, units, side, bias, n, **around):
    return native.linear(x, units, side, bias, n, 0, **around)


@WITH_VECTORS
@given(
    m=st.one_of(st.integers(1, 20), st.integers(21, 300)),
    n=st.integers(1, 90),
    k=st.integers(1, 400),
    kind=st.sampled_from(("normal", "bits", "zeros", "minus_zero", "subnormal", "dequantized")),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
)
@examples(20)
def test_the_bits_are_those_of_16_bit_weights(isa, m, n, k, kind, threads, seed):
    load.load(isa)
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(seed)
    weight = matrix(n, k, kind, seed)
    weight = torch.where(weight.abs() < 1e4, weight, torch.ones_like(weight))
    x, bias = torch.randn(m, k, generator=g).bfloat16(), torch.randn(n, generator=g).bfloat16()
    expected = dense(x, weight, bias)
    if m > 64:
        assert same_bits(in_12_bits(x, weight, bias), expected)
    else:
        assert same_bits(called(packed, x, *lossless.pack_12bit(weight), bias, n), expected)


@WITH_VECTORS
@pytest.mark.parametrize("m", [1, 3, 7, 40])
def test_norm_gate_bias_and_residual_are_as_around_16_bit_weights(isa, m):
    load.load(isa)
    g = torch.Generator().manual_seed(m)
    weight = matrix(192, 130, "normal", m)
    x, bias = torch.randn(m, 130, generator=g).bfloat16(), torch.randn(192, generator=g).bfloat16()
    around = {
        "residual": torch.randn(m, 96, generator=g).bfloat16(),
        "norm": "rms",
        "norm_weight": torch.randn(130, generator=g).bfloat16(),
        "activation": "silu",
        "gated": True,
    }
    assert same_bits(in_12_bits(x, weight, bias, **around), dense(x, weight, bias, **around))


@WITH_VECTORS
def test_a_weight_that_is_not_finite_reaches_its_own_output_alone(isa):
    load.load(isa)
    weight = matrix(40, 100, "normal", 0)
    weight[7, 50], weight[21, 99] = torch.nan, torch.inf
    y = in_12_bits(torch.ones(2, 100, dtype=torch.bfloat16), weight)
    assert [n for n in range(40) if not y[:, n].isfinite().all()] == [7, 21]


def test_tensors_that_do_not_fit_are_refused():
    load.load()
    weight = matrix(40, 100, "normal", 0)
    units, side = lossless.pack_12bit(weight)
    x = torch.ones(2, 100, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="x must be bfloat16"):
        packed(x.float(), units, side, None, 40)
    with pytest.raises(RuntimeError, match="not packed in 12 bits"):
        packed(x, units, side, None, 60)
    with pytest.raises(RuntimeError, match="palette and the patches"):
        packed(x, units, side[:12], None, 40)
