"""The C++ linear kernels against float64, on every instruction set that this machine runs.

For 20,000 examples of each test: ``pytest tests/kernels/native --hypothesis-profile=long --timeout=0``.
"""

import math
import os
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.quant.layouts import PackedLinear
from tests.kernels import reference
from tests.kernels.checks import VALUES, weights
from tests.kernels.harness import assert_close
from tests.kernels.native.running import DTYPES, ISAS, called, linear, rounded
from tests.kernels.packing import pack_linear
from tests.support.examples import examples

pytestmark = pytest.mark.usefixtures("restored")


def expected(x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None):
    """Returns the result in float64, and the sums of magnitudes of its elements."""
    grid, k = packed.unpack(), packed.in_features
    zero = grid.zero.double().repeat_interleave(grid.group_size, 1)[:, :k]
    steps = packed.dequantize(torch.float64) - zero
    y = reference.linear(rounded(x, grid.group_size), steps, bias=bias) + x.double() @ zero.T
    magnitude = x.double().abs() @ (steps.abs() + zero.abs()).T
    return y, magnitude if bias is None else magnitude + bias.double().abs()


def run(x, packed, bias):
    """Runs the kernel between guard zones, and again into poisoned memory; returns ``[M, N]``."""
    return called(linear, x, packed, bias)


def inputs(m, n, k, group, dtype, values, seed, with_bias=True, gap=0):
    g = torch.Generator().manual_seed(seed)
    weight = weights(n, k, values, 2e3 if dtype == torch.float16 else 2e6, g)
    x = torch.full((m, k + gap), math.nan, dtype=dtype)
    x[:, :k] = torch.randn(m, k, generator=g) * (1e-4 if values == "extreme" else 1.0)
    bias = torch.randn(n, generator=g).to(dtype) if with_bias else None
    return x[:, :k], pack_linear(weight, group, "native", "rtn"), bias


@st.composite
def cases(draw):
    sizes = draw(st.integers(1, 18)), draw(st.integers(1, 70)), draw(st.integers(1, 300))
    group, dtype = draw(st.sampled_from((32, 64, 128))), draw(st.sampled_from(DTYPES))
    values, seed = draw(st.sampled_from(VALUES)), draw(st.integers(0, 2**20))
    made = inputs(*sizes, group, dtype, values, seed, draw(st.booleans()), draw(st.sampled_from((0, 5))))
    return made


@ISAS
@given(case=cases(), threads=st.integers(1, 4))
@examples(15)
def test_any_shape(isa, case, threads):
    """Shapes, groups, partial blocks, dtypes, extreme weights, strided rows; no access outside."""
    load.load(isa)
    torch.set_num_threads(threads)
    assert_close(run(*case), *expected(*case))


@ISAS
@given(
    st.integers(1, 20), st.integers(200, 900), st.integers(500, 1500), st.sampled_from(DTYPES), st.integers(0, 2**20)
)
@examples(6)
def test_a_rows_bits_depend_on_neither_rows_nor_threads(isa, m, n, k, dtype, seed):
    """Linears large enough to be split, on all numbers of threads, and each row alone."""
    load.load(isa)
    x, packed, bias = inputs(m, n, k, 64, dtype, "normal", seed)
    torch.set_num_threads(1)
    alone = torch.cat([run(row[None], packed, bias) for row in x])
    assert_close(alone, *expected(x, packed, bias))
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(run(x, packed, bias), alone)


@ISAS
def test_activations_that_are_zero_or_not_finite(isa):
    load.load(isa)
    x, packed, _ = inputs(4, 20, 100, 32, torch.float32, "normal", 0)
    x = x.clone()
    x[0], x[1, 40], x[2, 99] = 0, math.nan, math.inf
    y = run(x, packed, None)
    assert (y[0] == 0).all()
    assert not y[1:3].isfinite().any()
    assert torch.equal(y[3], run(x[3:], packed, None)[0])


def test_rounded_activations_cost_half_a_step_at_most():
    """The distance to unrounded activations, from the definition of rounding."""
    load.load()
    x, packed, _ = inputs(3, 64, 256, 64, torch.float32, "normal", 1)
    exact = x.double() @ packed.dequantize(torch.float64).T
    grid = packed.unpack()
    steps = packed.dequantize(torch.float64) - grid.zero.double().repeat_interleave(64, 1)
    half = (x.unflatten(1, (-1, 64)).abs().amax(-1) / 254).double().repeat_interleave(64, 1)
    error = (run(x, packed, None).double() - exact).abs()
    assert (error <= half @ steps.abs().T * 1.001).all()
    assert error.max() > 0


@pytest.mark.parametrize("shape", [(100,), (2, 3, 100), (1, 1, 100), (0, 100)])
def test_any_number_of_dimensions(shape):
    load.load()
    _, packed, bias = inputs(1, 20, 100, 32, torch.float32, "normal", 0)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = torch.ops.river_native.linear(x, packed.qweight, packed.scale_zero, bias, 20, 32)
    assert y.shape == (*shape[:-1], 20)
    if x.numel():
        assert_close(y.reshape(-1, 20), *expected(x.reshape(-1, 100), packed, bias))
    if x.dim() == 3:
        turned = x.transpose(0, 1)
        again = torch.ops.river_native.linear(turned, packed.qweight, packed.scale_zero, bias, 20, 32)
        assert torch.equal(again, y.transpose(0, 1))


def test_callers_at_the_same_time():
    """A second caller does not wait for the threads of the first."""
    load.load()
    torch.set_num_threads(3)
    x, packed, bias = inputs(2, 900, 900, 64, torch.bfloat16, "normal", 0)
    first, wrong = run(x, packed, bias), []

    def call():
        torch.set_num_threads(3)
        wrong.extend(i for i in range(30) if not torch.equal(run(x, packed, bias), first))

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_starts_threads_of_its_own():
    load.load()
    torch.set_num_threads(2)
    x, packed, bias = inputs(2, 900, 900, 64, torch.bfloat16, "normal", 0)
    first = run(x, packed, bias)
    child = os.fork()
    if child == 0:
        same = torch.equal(
            torch.ops.river_native.linear(x, packed.qweight, packed.scale_zero, bias, packed.out_features, 64),
            first,
        )
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_fake_operator_gives_the_real_ones_shape_and_dtype():
    load.load()
    x, packed, bias = inputs(2, 20, 100, 32, torch.bfloat16, "normal", 0)
    arguments = (x.clone(), packed.qweight, packed.scale_zero, bias, 20, 32)
    torch.library.opcheck(
        torch.ops.river_native.linear.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 64, dtype=torch.float64)}, "float32, bfloat16 or float16"),
        ({"x": torch.ones(1, 96)}, "weight is not packed"),
        ({"group_size": 48}, "group_size"),
        ({"out_features": 17}, "weight is not packed"),
        ({"bias": torch.ones(15)}, "bias must be"),
        ({"bias": torch.ones(16).bfloat16()}, "bias must be"),
        ({"weight": torch.ones(1, 2, 4, 64)}, "weight is not packed"),
        ({"scale_zero": torch.ones(1, 2, 16, 2)}, "scale_zero is not packed"),
    ],
)
def test_what_is_refused(change, message):
    load.load()
    _, packed, _ = inputs(1, 16, 64, 32, torch.float32, "normal", 0)
    arguments = {
        "x": torch.ones(1, 64),
        "weight": packed.qweight,
        "scale_zero": packed.scale_zero,
        "bias": None,
        "out_features": 16,
        "group_size": 32,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.river_native.linear(**{**arguments, **change})


@ISAS
@given(
    chosen=st.lists(st.integers(-1, 4), min_size=1, max_size=12),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 300), st.sampled_from((32, 64, 128))),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 4),
)
@examples(10)
def test_each_row_meets_the_expert_that_it_chose(isa, chosen, sizes, dtype, threads):
    """The bits of that weight alone, zeros without one; other weights hold NaN."""
    native = load.load(isa)
    torch.set_num_threads(threads)
    n, k, group = sizes
    experts = [inputs(1, n, k, group, dtype, "normal", seed)[1] for seed in range(4)]
    x = torch.randn(len(chosen), k, generator=torch.Generator().manual_seed(n)).to(dtype)
    scale_zero = torch.stack([e.scale_zero if i in chosen else e.scale_zero * math.nan for i, e in enumerate(experts)])
    how = n, group
    y = native.experts(x, torch.stack([e.qweight for e in experts]), scale_zero, torch.tensor(chosen), *how)
    for row, number in enumerate(chosen):
        alone = torch.zeros(n, dtype=dtype)
        if 0 <= number < len(experts):
            one = experts[number]
            alone = native.linear(x[row : row + 1], one.qweight, one.scale_zero, None, *how)[0]
        assert torch.equal(y[row], alone), (row, number)
