"""The C++ linears with 4-bit and 16-bit weights, and what is around them, against float64 on every instruction set.

Norms, activations, gates and residuals, and stacks of experts. Every call also runs from a tape (`running.called`).
For 20,000 examples of each test: ``pytest tests/kernels/native --hypothesis-profile=long --timeout=0``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels import ops  # noqa: F401  (registers river::norm)
from river_compile.kernels.native import load
from river_compile.kernels.quant.layouts import PackedLinear
from tests.kernels import reference
from tests.kernels.checks import VALUES, activated_magnitude, weights
from tests.kernels.harness import TOLERANCE, assert_rounded
from tests.kernels.native.running import DTYPES, EACH_ISA, ISAS, called, dense, linear, native, rounded
from tests.kernels.packing import pack_linear
from tests.support.examples import examples

NORMS = ("none", "rms", "rms_plus_one", "layer")
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "relu")

pytestmark = pytest.mark.usefixtures("restored")

WITH_VECTORS = [each for each in EACH_ISA if each.id != "portable"]  # 16-bit linears of any number of rows
IN_BFLOAT16 = ("amx", "avx512_bf16")  # which multiply activations in bfloat16 with weights in it
FEW_ROWS = 8  # the most rows that `dense` multiplies itself


@dataclass(frozen=True)
class Around:
    """Optional arguments of an operator, by name."""

    residual: torch.Tensor | None = None
    norm: str = "none"
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None
    eps: float = 1e-6
    activation: str = "none"
    gated: bool = False

    @property
    def arguments(self) -> dict[str, object]:
        return vars(self)


@dataclass(frozen=True)
class Case:
    """A call with 4-bit weights, or with weights of x's dtype."""

    x: torch.Tensor
    weight: PackedLinear | torch.Tensor
    bias: torch.Tensor | None
    around: Around

    def run(self, rows: slice = slice(None)) -> torch.Tensor:
        x, a = self.x[rows], self.around
        rest = replace(a, residual=None if a.residual is None else a.residual[rows]).arguments
        if isinstance(self.weight, torch.Tensor):
            if len(x) > load.few_rows(x.dtype):  # (which is not recorded)
                return dense(x, self.weight, self.bias, **rest)
            return called(dense, x, self.weight, self.bias, **rest)
        return called(linear, x, self.weight, self.bias, **rest)


def case_of(
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    values: str = "normal",
    seed: int = 0,
    group: int = 0,
    norm: str = "none",
    norm_bias: bool = False,
    bias: bool = False,
    residual: bool = False,
    activation: str = "none",
    gated: bool = False,
    gap: int = 0,
) -> Case:
    """Makes a call for M rows, N and K features; `group` 0: weights in x's dtype; `gap`: between rows."""
    (m, n, k), g = sizes, torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    def rows(width: int, factor: float = 1.0) -> torch.Tensor:
        wide = torch.full((m, width + gap), math.nan, dtype=dtype)
        wide[:, :width] = random(m, width) * factor
        return wide[:, :width]

    matrix = weights(n, k, values, 2e3 if dtype == torch.float16 else 2e6, g)
    weight = pack_linear(matrix, group, "native", "rtn") if group else matrix.clamp(-1e4, 1e4).to(dtype)
    around = Around(
        rows(n // 2 if gated else n) if residual else None,
        norm,
        random(k) if norm != "none" else None,
        random(k) if norm == "layer" and norm_bias else None,
        1e-5,
        activation,
        gated,
    )
    return Case(rows(k, 1e-4 if values == "extreme" else 1.0), weight, random(n) if bias else None, around)


@st.composite
def cases(draw, dense: bool):
    gated = draw(st.booleans())
    n = draw(st.sampled_from((32, 64, 96))) if gated else draw(st.integers(1, 70))
    return case_of(
        (draw(st.integers(1, FEW_ROWS if dense else 18)), n, draw(st.integers(1, 300))),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(VALUES)),
        draw(st.integers(0, 2**20)),
        group=0 if dense else draw(st.sampled_from((32, 64, 128))),
        norm=draw(st.sampled_from(NORMS)),
        norm_bias=draw(st.booleans()),
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=gated,
        gap=draw(st.sampled_from((0, 5))),
    )


def normed(x: torch.Tensor, a: Around) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns norm(x) in float64, and the sums of magnitudes of its elements."""
    h = reference.norm(x, a.norm, a.norm_weight, a.norm_bias, a.eps)
    if a.norm_weight is None:
        return h, h.abs()
    plus_one, weight = a.norm == "rms_plus_one", a.norm_weight.double().abs()
    if a.norm != "layer":
        return h, reference.norm(x, "rms", torch.ones_like(weight), None, a.eps).abs() * (weight + plus_one)
    x = x.double()
    factor = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + a.eps)
    reach = (x.abs() + x.mean(-1, keepdim=True).abs()) * factor * weight
    return h, reach if a.norm_bias is None else reach + a.norm_bias.double().abs()


def product(case: Case, isa: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns norm(x) W^T + bias in float64, and the sums of magnitudes of its elements."""
    h, reach = normed(case.x, case.around)
    read, undecided = h, torch.zeros_like(h)
    if isinstance(case.weight, torch.Tensor):
        steps, zero = case.weight.double(), torch.zeros(case.weight.shape, dtype=torch.float64)
        if case.around.norm != "none" and case.weight.dtype == torch.bfloat16 and isa in IN_BFLOAT16:
            # Both operands are bfloat16. What a norm in float32 leaves open is which way some are rounded.
            read = h.bfloat16().double()
            undecided = (h + 1e-5 * reach).bfloat16().double() - (h - 1e-5 * reach).bfloat16().double()
    else:
        grid, (n, k) = case.weight.unpack(), (case.weight.out_features, h.shape[1])
        zero = grid.zero.double().repeat_interleave(grid.group_size, 1)[:n, :k]
        steps = case.weight.dequantize(torch.float64) - zero
        read = rounded(h, grid.group_size)
        if case.around.norm != "none":
            undecided, reach = near_ties(h, reach, grid.group_size)
    y = reference.linear(read, steps, bias=case.bias) + h @ zero.T
    total = reach @ (steps.abs() + zero.abs()).T + undecided @ steps.abs().T / TOLERANCE[torch.float32]
    return y, total if case.bias is None else total + case.bias.double().abs()


def near_ties(h: torch.Tensor, reach: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns possible flips of rounding to 8 bits: each element's step, and its group's largest `reach`."""
    k = h.shape[1]
    groups, reaches = (torch.nn.functional.pad(t, (0, -k % group)).unflatten(1, (-1, group)) for t in (h, reach))
    step, most = groups.abs().amax(-1, keepdim=True) / 127, reaches.amax(-1, keepdim=True)
    q = (groups / step).nan_to_num(0.0)
    from_tie = ((q - q.floor()) - 0.5).abs()
    open_ = torch.where(from_tie <= 1e-5 * most / step.clamp_min(1e-300), step, 0.0)
    return tuple(t.expand_as(groups).flatten(1)[:, :k] for t in (open_, most))


def check(case: Case, isa: str = "any") -> None:
    """Compares an operator's result on one instruction set with float64."""
    a = case.around
    y, total = product(case, isa)
    total = activated_magnitude(y, total, a.activation, a.gated)
    if a.gated:
        gate, up = y.chunk(2, -1)
        y = reference.activate(gate, a.activation) * up
    else:
        y = reference.activate(y, a.activation)
    if a.residual is not None:
        y, total = y + a.residual.double(), total + a.residual.double().abs()
    assert_rounded(case.run(), y, total)


@ISAS
@given(case=cases(dense=False), threads=st.integers(1, 4))
@examples(12)
def test_4_bit_weights(isa, case, threads):
    load.load(isa)
    torch.set_num_threads(threads)
    check(case, isa.name)


@ISAS
@given(case=cases(dense=True), threads=st.integers(1, 4))
@examples(12)
def test_weights_in_the_activations_dtype(isa, case, threads):
    """Memory after the weight holds NaN and is not read."""
    load.load(isa)
    torch.set_num_threads(threads)
    check(case, isa.name)


@given(m=st.integers(FEW_ROWS + 1, 60), n=st.integers(1, 20), k=st.integers(1, 300), seed=st.integers(0, 2**20))
@examples(10)
def test_more_rows_go_through_a_librarys_product(m, n, k, seed):
    """In float32, so that the library's result is not rounded before the rest."""
    load.load()
    gated, norm = seed % 2 == 0, NORMS[seed % len(NORMS)]
    options = {"bias": True, "norm_bias": True, "residual": seed % 3 > 0, "activation": "silu", "gap": seed % 5}
    check(case_of((m, 32 * n if gated else n, k), torch.float32, seed=seed, norm=norm, gated=gated, **options))
    case = case_of((m, n, k), torch.float32, seed=seed)
    with pytest.raises(RuntimeError, match="a matmul of many rows must not be recorded"):
        called(dense, case.x, case.weight)


@pytest.mark.parametrize("isa", WITH_VECTORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(m=st.integers(17, 100), n=st.integers(1, 100), k=st.integers(1, 300), seed=st.integers(0, 2**20))
@examples(12)
def test_many_rows_in_16_bits(isa, dtype, m, n, k, seed):
    """Partial blocks of rows and features; tapes hold up to 64 rows, or 16 positions of one sequence."""
    load.load(isa)
    torch.set_num_threads(1 + seed % 3)
    gated, norm = seed % 2 == 0, NORMS[seed % len(NORMS)]
    options = {"bias": seed % 7 > 2, "norm_bias": True, "residual": seed % 3 > 0, "activation": "silu", "gap": seed % 5}
    case = case_of((m, n // 32 * 32 + 32 if gated else n, k), dtype, seed=seed, norm=norm, gated=gated, **options)
    check(case, isa.name)
    cut = case.weight.split((n // 3 + 1, len(case.weight) - n // 3 - 1))
    assert torch.equal(native.dense(case.x, list(cut), []), native.dense(case.x, [case.weight], []))
    with pytest.raises(RuntimeError, match="a matmul of many rows must not be recorded"):
        called(dense, case.x[None].contiguous(), case.weight)


def test_matrices_one_below_the_other():
    """Up to four, split anywhere, with and without biases: the bits of one weight."""
    load.load()
    g = torch.Generator().manual_seed(0)
    for sizes in ((5,), (16, 16), (3, 30, 15), (20, 1, 1, 42)):
        parts = [torch.randn(n, 70, generator=g).bfloat16() for n in sizes]
        biases = [torch.randn(n, generator=g).bfloat16() for n in sizes]
        for rows in (1, 3, 8, 20):
            x = torch.randn(rows, 70, generator=g).bfloat16()
            assert torch.equal(native.dense(x, parts, biases), native.dense(x, [torch.cat(parts)], [torch.cat(biases)]))
            assert torch.equal(native.dense(x, parts, []), native.dense(x, [torch.cat(parts)], []))
    with pytest.raises(RuntimeError, match="weights must be at most four"):
        native.dense(x, [parts[0]] * 5, [])
    with pytest.raises(RuntimeError, match="biases must be as long as the weights have rows"):
        native.dense(x, parts, biases[::-1])


@ISAS
@given(
    st.integers(2, 40),
    st.integers(200, 700),
    st.integers(300, 1500),
    st.sampled_from((0, 32, 128)),
    st.sampled_from(DTYPES),
    st.sampled_from(NORMS),
    st.booleans(),
    st.integers(0, 2**20),
)
@examples(4)
def test_a_rows_bits_depend_on_neither_rows_nor_threads(isa, m, n, k, group, dtype, norm, gated, seed):
    """Linears large enough to be split, with all epilogues."""
    load.load(isa)
    n = n // 32 * 32 if gated else n
    if not group and load.few_rows(dtype) == FEW_ROWS:  # (a library multiplies more)
        m = min(m, FEW_ROWS)
    options = {"bias": True, "norm_bias": True, "residual": True, "activation": "silu"}
    case = case_of((m, n, k), dtype, seed=seed, group=group, norm=norm, gated=gated, **options)
    torch.set_num_threads(1)
    alone = torch.cat([case.run(slice(i, i + 1)) for i in range(m)])
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        assert torch.equal(case.run(), alone)


@ISAS
@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("norm", NORMS)
def test_rows_that_are_zero_or_not_finite_stay_by_themselves(isa, norm, group):
    load.load(isa)
    case = case_of((4, 20, 100), torch.float32, group=group, norm=norm, bias=True)
    alone = case.run(slice(3, 4))
    case.x[0], case.x[1, 40], case.x[2, 99] = 0, math.nan, math.inf
    y = case.run()
    assert torch.equal(y[0], case.bias), "without a norm's bias, zero stays zero"
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()
    assert torch.equal(y[3:], alone)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_far_from_zero(activation):
    """The limits of exponentials, and NaN for NaN."""
    load.load()
    x = torch.tensor([-1e9, -1e4, -200.0, -88.5, -87.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 87.0, 200.0, 1e9, math.nan])
    rows = x[:, None].split(FEW_ROWS)
    y = torch.cat([called(dense, part, torch.ones(1, 1), activation=activation)[:, 0] for part in rows])
    torch.testing.assert_close(
        y.double(), reference.activate(x.double(), activation), atol=1e-6, rtol=1e-6, equal_nan=True
    )


@ISAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS[1:])
def test_a_norm_and_the_residual_after_it(isa, dtype, kind):
    """Partial vectors, with and without bias and residual, against float64 and torch."""
    load.load(isa)
    g = torch.Generator().manual_seed(0)
    for m, k in ((1, 1), (3, 100), (2, 576)):
        x, weight, residual = (torch.randn(*size, generator=g).to(dtype) for size in ((m, k), (k,), (m, k)))
        bias = torch.randn(k, generator=g).to(dtype) if kind == "layer" else None
        for added in (residual, None):
            y = called(native.norm, x, kind, weight, bias, 1e-5, added)
            expected = reference.norm(x, kind, weight, bias, 1e-5) + (0 if added is None else added.double())
            tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
            torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)
            again = torch.ops.river.norm(x, kind, weight, bias, 1e-5, added)
            torch.testing.assert_close(y, again, atol=tolerance, rtol=tolerance)


def turned(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def apart(t: torch.Tensor) -> torch.Tensor:
    return t.repeat(1, 1, 2)[..., : t.shape[-1]]


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("change", [torch.clone, turned, apart])
def test_leading_dimensions_and_strides(group, change):
    """Strided rows of x and of the residual, with any leading sizes; one vector, and no row."""
    load.load()
    options = {"norm": "rms", "residual": True, "activation": "silu", "bias": True}
    case = case_of((6, 32, 100), torch.bfloat16, group=group, **options)
    expected = case.run()
    for shape, rows in (((2, 3), slice(6)), ((), 0), ((0,), slice(0))):
        x, residual = (t[rows].reshape(*shape, t.shape[1]) for t in (case.x, case.around.residual))
        if x.dim() == 3:
            x, residual = change(x), change(residual)
        rest = replace(case.around, residual=residual).arguments
        y = linear(x, case.weight, case.bias, **rest) if group else dense(x, case.weight, case.bias, **rest)
        assert torch.equal(y, expected[rows].reshape(*shape, 32))


def test_the_fake_operators_give_the_real_ones_shape_and_dtype():
    load.load()
    x, weight = torch.randn(2, 3, 100).bfloat16(), torch.randn(64, 100).bfloat16()
    packed, checks = pack_linear(weight.float(), 32, "native", "rtn"), ("test_schema", "test_faketensor")
    for arguments in ((x, [weight], []), (x, [weight], [], None, "none", None, None, 0.0, "silu", True)):
        torch.library.opcheck(native.dense.default, arguments, test_utils=checks)
    arguments = (x, packed.qweight, packed.scale_zero, None, 64, 32)
    torch.library.opcheck(native.linear.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(1, 64, dtype=torch.float64), "weight": torch.ones(32, 64).double()}, "float32, bfloat16 or"),
        ({"weight": torch.ones(32, 96)}, "weights must be contiguous"),
        ({"weight": torch.ones(64, 32).T}, "weights must be contiguous"),
        ({"weight": torch.ones(32, 64).half()}, "weights must be contiguous"),
        ({"bias": torch.ones(31)}, "biases must be as long"),
        ({"residual": torch.ones(1, 31)}, "residual must have y's dtype and shape"),
        ({"residual": torch.ones(1, 32).half()}, "residual must have y's dtype and shape"),
        ({"residual": torch.ones(2, 32)}, "residual must have y's dtype and shape"),
        ({"norm": "rms"}, "norm_weight must be given where there is a norm"),
        ({"norm_weight": torch.ones(64)}, "norm_weight must be given where there is a norm"),
        ({"norm": "rms", "norm_weight": torch.ones(63)}, "norm_weight must be contiguous"),
        ({"norm": "layer", "norm_weight": torch.ones(64), "norm_bias": torch.ones(63)}, "norm_bias must be contiguous"),
        ({"norm": "batch", "norm_weight": torch.ones(64)}, "norm='batch' is not known"),
        ({"activation": "swish"}, "activation='swish' is not known"),
        ({"weight": torch.ones(48, 64), "gated": True}, "multiple of 32"),
    ],
)
def test_what_is_refused(change, message):
    load.load()
    around = Around(**{name: value for name, value in change.items() if name in vars(Around())})
    product = {"x": torch.ones(1, 64), "weight": torch.ones(32, 64), "bias": None}
    with pytest.raises(RuntimeError, match=message):
        dense(*(change.get(name, value) for name, value in product.items()), **around.arguments)


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
def test_packed_weights_that_do_not_fit_are_refused(change, message):
    load.load()
    packed = pack_linear(torch.ones(16, 64), 32, "native", "rtn")
    arguments = {
        "x": torch.ones(1, 64),
        "weight": packed.qweight,
        "scale_zero": packed.scale_zero,
        "bias": None,
        "out_features": 16,
        "group_size": 32,
    }
    with pytest.raises(RuntimeError, match=message):
        native.linear(**{**arguments, **change})


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
    load.load(isa)
    torch.set_num_threads(threads)
    n, k, group = sizes
    experts = [case_of((1, n, k), dtype, seed=seed, group=group).weight for seed in range(4)]
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
