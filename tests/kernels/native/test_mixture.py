"""The C++ operators of mixtures of experts: against float64, and each token's bits against those of the token alone.

Every call also runs from a tape, between guard zones (`running.called`).
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.native import load
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import pack_lossless_stack, pack_stack
from river_compile.kernels.quant.mxfp4 import unpack_mxfp4
from tests.kernels.native.running import ISAS, called, native, same_bits
from tests.support.examples import examples

EXPERTS = 5
WEIGHTS = ("4 bits", "12 bits", "MXFP4", "dense", "transposed")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stacked(n: int, k: int, weights: str, dtype: torch.dtype, seed: int) -> tuple[tuple, torch.Tensor]:
    """Returns the operands of a stack (weight, side), its group size, and what it holds in float64."""
    stack = (drawn(EXPERTS, n, k, seed=seed) / k**0.5).to(dtype)
    if weights == "dense":
        return (stack, None, 0), stack.double()
    if weights == "transposed":
        return (stack.mT.contiguous().mT, None, 0), stack.double()
    if weights == "MXFP4":
        blocks, scales = drawn_mxfp4(EXPERTS, n, k, seed=seed)
        return (blocks, scales, 0), unpack_mxfp4(blocks, scales).double()
    packed = (
        pack_lossless_stack(stack)
        if weights == "12 bits"
        else pack_stack(quantize(stack.flatten(0, 1), 32, "rtn").rounded(torch.bfloat16), "native", EXPERTS)
    )
    exact = packed.dequantize(torch.float64).view(EXPERTS, n, k)
    return (packed.qweight, packed.scale_zero, packed.group_size), exact


def drawn_mxfp4(*shape: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns random blocks and scales; values are below one."""
    g, groups = torch.Generator().manual_seed(seed), (*shape[:-1], shape[-1] // 32)
    blocks = torch.randint(0, 256, (*groups, 16), generator=g, dtype=torch.uint8)
    return blocks, torch.randint(118, 125, groups, generator=g, dtype=torch.uint8)


def gated(both: torch.Tensor, activation: str, pairs: bool) -> torch.Tensor:
    gate, up = (both[..., 0::2], both[..., 1::2]) if pairs else both.chunk(2, -1)
    if activation == "silu":
        return torch.nn.functional.silu(gate) * up
    gate = gate.clamp(max=7)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7, 7) + 1)


@ISAS
@given(
    tokens=st.integers(1, 20),
    each=st.integers(1, 4),
    sizes=st.tuples(st.sampled_from((32, 96, 160)), st.sampled_from((32, 64))),
    weights=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    around=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from(("silu", "clamped_swish"))),
    threads=st.integers(1, 4),
    seed=st.integers(0, 1 << 20),
)
@examples(20)
def test_a_mixture(isa, tokens, each, sizes, weights, dtype, around, threads, seed):
    """With biases and a residual or without; unchosen experts hold NaN, and rows without an expert add nothing."""
    load.load(isa)
    torch.set_num_threads(threads)
    if weights in ("12 bits", "MXFP4"):
        dtype = torch.bfloat16
    (k, features), (biased, pairs, added, activation) = sizes, around
    (up, up_side, up_group), exact_up = stacked(2 * features, k, weights, dtype, seed)
    (down, down_side, down_group), exact_down = stacked(k, features, weights, dtype, seed + 1)
    up_bias = drawn(EXPERTS, 2 * features, seed=seed, dtype=dtype) if biased else None
    down_bias = drawn(EXPERTS, k, seed=seed + 2, dtype=dtype) if biased else None
    x, residual = drawn(tokens, k, seed=seed, dtype=dtype), drawn(tokens, k, seed=seed + 3, dtype=dtype)
    index = torch.randint(-1, EXPERTS, (tokens, each), generator=torch.Generator().manual_seed(seed))
    weight = drawn(tokens, each, seed=seed + 4).softmax(-1)
    poison(index, up, up_side)

    def mixture(some: slice) -> torch.Tensor:
        operands = (up, up_side, up_bias, up_group, down, down_side, down_bias, down_group)
        rest = (features, activation, pairs, residual[some] if added else None)
        return called(native.mixture, x[some], index[some], weight[some], *operands, *rest)

    y = mixture(slice(None))
    expected = residual.double() if added else torch.zeros(tokens, k, dtype=torch.float64)
    for token in range(tokens):
        for j, chosen in enumerate(index[token].tolist()):
            if chosen >= 0:
                both = exact_up[chosen] @ x[token].double() + (up_bias[chosen].double() if biased else 0)
                made = exact_down[chosen] @ gated(both, activation, pairs)
                expected[token] += weight[token, j].double() * (made + (down_bias[chosen].double() if biased else 0))
    rounding = {"4 bits": 0.05}.get(weights, 0.0) + (0.03 if dtype == torch.bfloat16 else 1e-4)
    torch.testing.assert_close(y.double(), expected, rtol=rounding, atol=rounding * float(1 + expected.abs().max()))
    for token in range(tokens):
        assert same_bits(mixture(slice(token, token + 1))[0], y[token]), f"token {token} alone"


def poison(index: torch.Tensor, up: torch.Tensor, side: torch.Tensor | None) -> None:
    """Fills the first stack's experts that no token chose with NaN, where their form has any."""
    unread = torch.tensor([expert not in index for expert in range(EXPERTS)])
    target = up if up.is_floating_point() else side
    assert target is not None
    if target.is_floating_point():
        target[unread] = float("nan")
    elif target.dtype == torch.uint8:
        target[unread] = 255  # scales that are no number


@ISAS
@given(
    tokens=st.integers(1, 20), sizes=st.tuples(st.integers(1, 70), st.integers(1, 150)), seed=st.integers(0, 1 << 20)
)
@examples(20)
def test_12_bits_have_the_bits_of_16(isa, tokens, sizes, seed):
    """Of stacks whose patches differ by expert, and which may be stored transposed."""
    load.load(isa)
    n, k = sizes
    x = drawn(tokens, k, seed=seed, dtype=torch.bfloat16)
    stack = (drawn(EXPERTS, n, k, seed=seed) / k**0.5).bfloat16()
    stack[1, -1, -1] = 2.0**40  # a patch
    packed = pack_lossless_stack(stack)
    assert same_bits(pack_lossless_stack(stack.mT.contiguous(), transposed=True).qweight, packed.qweight)
    assert same_bits(packed.dequantize(torch.bfloat16).view_as(stack), stack)
    expert = torch.randint(-1, EXPERTS + 1, (tokens,), generator=torch.Generator().manual_seed(seed))
    dense = called(native.experts, x, stack, None, expert, n, 0)
    assert same_bits(called(native.experts, x, packed.qweight, packed.scale_zero, expert, n, 0), dense)
    for row, chosen in enumerate(expert.tolist()):
        alone = torch.zeros(n, dtype=torch.bfloat16)
        if 0 <= chosen < EXPERTS:
            alone = (stack[chosen].double() @ x[row].double()).bfloat16()
        torch.testing.assert_close(dense[row], alone, rtol=2e-2, atol=2e-2 * float(1 + alone.abs().max()))


@ISAS
@given(
    tokens=st.integers(1, 40), n=st.integers(1, 70), groups=st.integers(1, 7), seed=st.integers(0, 1 << 20),
    scales=st.sampled_from(((118, 125), (0, 3), (250, 254))),
)  # fmt: skip
@examples(30)
def test_mxfp4_and_transposed_stacks_have_the_bits_of_rows(isa, tokens, n, groups, seed, scales):
    """Of a few tokens and of many for each expert, with scales from the least to the largest one."""
    load.load(isa)
    k, g = 32 * groups, torch.Generator().manual_seed(seed)
    x = drawn(tokens, k, seed=seed, dtype=torch.bfloat16)
    blocks, _ = drawn_mxfp4(EXPERTS, n, k, seed=seed)
    scales = torch.randint(*scales, blocks.shape[:-1], generator=g, dtype=torch.uint8)
    stack = unpack_mxfp4(blocks, scales)
    expert = torch.randint(-1, EXPERTS + 1, (tokens,), generator=g)
    dense = called(native.experts, x, stack, None, expert, n, 0)
    assert same_bits(called(native.experts, x, blocks, scales, expert, n, 0), dense)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        rows, x = (drawn(*shape, seed=seed, dtype=dtype) for shape in ((EXPERTS, n, k), (tokens, k)))
        turned = called(native.experts, x, rows.mT.contiguous().mT, None, expert, n, 0)
        assert same_bits(turned, called(native.experts, x, rows, None, expert, n, 0)), dtype


@ISAS
@given(
    logits=st.lists(st.lists(st.integers(-8, 8), min_size=6, max_size=6), min_size=1, max_size=5),
    each=st.integers(1, 6),
    routing=st.sampled_from(("all", "all_normalised", "chosen")),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    floats=st.booleans(),
)
@examples(30)
def test_a_router(isa, logits, each, routing, dtype, floats):
    """The largest logits, of equal ones the first, with the weights of a softmax."""
    load.load(isa)
    z = torch.tensor(logits, dtype=dtype) / 2
    weight, index = native.route(z, each, routing, floats)
    order = z.double().sort(descending=True, stable=True)
    assert torch.equal(index, order.indices[:, :each])
    chosen = order.values[:, :each]
    expected = chosen.softmax(-1) if routing != "all" else z.double().softmax(-1).gather(1, index)
    assert weight.dtype == (torch.float32 if floats else dtype)
    torch.testing.assert_close(
        weight.double(), expected, rtol=1e-2 if weight.dtype != torch.float32 else 1e-5, atol=1e-6
    )


@ISAS
def test_a_router_that_meets_nan_chooses_experts_that_exist(isa):
    load.load(isa)
    _, index = native.route(torch.full((3, 7), float("nan")), 4, "all", True)
    assert torch.equal(index, torch.arange(4).expand(3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 33)}, "weight must be a contiguous stack in x's dtype, with these features"),
        ({"index": torch.zeros(2, 2, dtype=torch.int32)}, "index must be"),
        ({"weight": torch.ones(2, 1)}, "weight must be"),
        ({"features": 24}, "features must be a multiple of 16"),
        ({"up_bias": torch.ones(5, 3)}, "up_bias must be a row for each expert"),
        ({"down": torch.ones(4, 32, 16)}, "up and down must have as many experts"),
        ({"activation": "swish"}, "activation='swish' is not known"),
        ({"residual": torch.ones(1, 32)}, "residual must"),
    ],
)
def test_what_a_mixture_refuses(change, message):
    load.load()
    given = {
        "x": torch.ones(2, 32), "index": torch.zeros(2, 2, dtype=torch.int64), "weight": torch.ones(2, 2),
        "up": torch.ones(5, 32, 32), "up_side": None, "up_bias": None, "up_group": 0, "down": torch.ones(5, 32, 16),
        "down_side": None, "down_bias": None, "down_group": 0, "features": 16, "activation": "silu", "pairs": False,
    }  # fmt: skip
    native.mixture(**given)
    with pytest.raises(RuntimeError, match=message):
        native.mixture(**{**given, **change})
