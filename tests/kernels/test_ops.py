"""The operators: `opcheck`, kernels against plain torch, layouts against each other, shapes, strides, and errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves, tree_map_only

from river_compile.kernels import cache_ops, ops
from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import pack_stack
from river_compile.kernels.triton import operators  # noqa: F401  (registers generated kernels)
from tests.kernels import reference
from tests.kernels.harness import TOLERANCE
from tests.kernels.packing import pack_linear
from tests.kernels.samples import G, caches, packed, random, sample_calls, stacked
from tests.support.examples import examples

river = torch.ops.river
MEANING = {  # of operators with generated kernels
    **{name: getattr(ops, name) for name in ("linear", "merged", "experts", "residual_score")},
    **{name: getattr(cache_ops, name) for name in ("kv_fill", "attend", "decode_attention")},
}
LAYOUTS = pytest.mark.parametrize("layout", ["triton", "plain"])


@pytest.fixture(autouse=True)
def _same_numbers():
    """A test draws the same numbers in any order of tests."""
    G.manual_seed(0)


@pytest.mark.parametrize("call", sample_calls())
def test_opcheck(call):
    torch.library.opcheck(getattr(river, call.split()[0]).default, sample_calls()[call])


@pytest.mark.parametrize("call", [call for call in sample_calls() if call.split()[0] in MEANING])
def test_a_generated_kernel_computes_what_its_operator_says(call):
    """Results, and what is left in the caches and the counter."""
    name = call.split()[0]
    one, other = (tree_map_only(torch.Tensor, torch.Tensor.clone, sample_calls()[call]) for _ in range(2))
    made, said = getattr(river, name)(*one), MEANING[name](*other)
    kernels, plain = (
        [x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in ((made, one), (said, other))
    )
    torch.testing.assert_close(kernels, plain, atol=1e-5, rtol=1e-4)


def test_every_operator_has_a_sample():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "river::" in name}
    tested_elsewhere: set[str] = set()
    assert names - tested_elsewhere == {call.split()[0] for call in sample_calls()}


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (20, 64), (0, 64)])
def test_linear_of_any_leading_shape(layout, dtype, shape):
    p, x = packed(24, 64, layout), random(*shape, dtype=dtype)
    bias, residual = random(24, dtype=dtype), random(*shape[:-1], 24, dtype=dtype)
    y = river.linear(x, p.qweight, p.scale_zero, bias, 24, 32, layout, residual)
    assert (y.shape, y.dtype) == ((*shape[:-1], 24), dtype)
    expected = reference.linear(x, p.dequantize(torch.float64), bias=bias, residual=residual)
    torch.testing.assert_close(y.double(), expected, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@LAYOUTS
def test_rows_of_a_wider_tensor_and_transposed_inputs(layout):
    p, wide = packed(24, 64, layout), random(5, 3, 64)
    for x in (wide[:, -1], wide[:, ::2], random(64, 5).T):
        y = river.linear(x, p.qweight, p.scale_zero, None, 24, 32, layout)
        expected = reference.linear(x, p.dequantize(torch.float64))
        torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "rms_plus_one", "layer"])
@pytest.mark.parametrize("rows", [1, 3])
def test_both_layouts_compute_the_same_mlp_and_projections(norm, rows):
    matrix = random(32, 96) / 10  # gate rows, then up rows
    x, weight, bias = random(rows, 96), random(96), random(96) if norm == "layer" else None
    h = reference.norm(x, norm, weight, bias, 1e-5)
    for layout in ("triton", "plain"):
        p = pack_linear(matrix, 32, layout, "rtn")
        exact = p.dequantize(torch.float64)
        weights, norms = (p.qweight, p.scale_zero, None, 32, 32, layout), (norm, weight, bias, 1e-5)
        y = river.linear(x, *weights, None, *norms)
        torch.testing.assert_close(y.double(), reference.linear(h, exact), atol=3e-5, rtol=1e-4)
        for activation in ("silu", "gelu", "gelu_tanh", "relu"):
            y = river.linear(x, *weights, None, *norms, activation, True)
            expected = reference.linear(h, exact, activation=activation, gated=True)
            torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)
        y = river.linear(x, *weights, None, *norms, "gelu")
        expected = reference.linear(h, exact, activation="gelu")
        torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-4)


def test_filling_and_attending_a_strided_cache_step_by_step():
    """Three tokens into a slice of a larger cache, against attention over them."""
    storage = random(2, 1, 6, 2, 16)
    k_cache, v_cache = storage[..., 0, :], storage[..., 1, :]
    for step in range(3):
        qkv, slot = random(2, 1, 4 * 16), torch.tensor([step])
        q = river.kv_fill(qkv, None, None, None, None, slot, k_cache, v_cache, "none", 1e-6, False)
        assert torch.equal(q, qkv.view(2, 4, 16)[:, :2])
        assert torch.equal(k_cache[:, 0, step], qkv.view(2, 4, 16)[:, 2])
        assert torch.equal(v_cache[:, 0, step], qkv.view(2, 4, 16)[:, 3])
        written = (torch.arange(6) <= step).expand(2, 6)
        out = river.decode_attention(q, k_cache, v_cache, written, 0.25, 0.0)
        expected = reference.attention(q, k_cache, v_cache, scale=0.25, mask=written)
        torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_step_in_one_launch_is_that_in_two():
    """q, cache entries, sums and the counter agree."""
    apart, once = caches(), caches()
    for a, b in zip(apart, once, strict=True):
        b.copy_(a)
    counter = torch.tensor(0)
    for step in range(4):
        qkv, cos, sin = random(2, 1, 4 * 16), random(1, 16), random(1, 16)
        made = (qkv, random(16), random(16), cos, sin)
        written = (torch.arange(6) <= step).expand(2, 6)
        q = river.kv_fill(*made, torch.tensor([step]), *apart, "rms", 1e-6, True)
        expected = river.decode_attention(q, *apart, written, 0.25, 2.0)
        how = ("rms", 1e-6, True, written, 0.25, 2.0)
        place = (torch.tensor([step]), None) if step == 2 else (None, counter)
        torch.testing.assert_close(river.attend(*made, *place, *once, *how), expected, atol=1e-5, rtol=1e-5)
        counter += step == 2
        for a, b in zip(apart, once, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    assert counter == 4


@pytest.mark.parametrize(("softcap", "sunk"), [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize("positions", [3, 10])
def test_several_positions_are_written_and_attend_as_one_by_one(positions, softcap, sunk):
    """Bit for bit up to 16 of all sequences; PyTorch attends from more."""
    shape = (2, 1, 14, 16)
    before = random(*shape), random(*shape)
    together, alone = ([cache.clone() for cache in before] for _ in range(2))
    qkv, norms = random(2, positions, 4 * 16), (random(16), random(16))
    cos, sin = random(1, positions, 16), random(1, positions, 16)
    seen = torch.ones(2, 1, positions, 14, dtype=torch.bool).tril(2)
    seen[1, ..., :2] = False
    how, counters = ("rms", 1e-6, True), [torch.tensor(2), torch.tensor(2)]
    last = (0.25, softcap, True, False, random(2) if sunk else None)
    out = river.attend(qkv, *norms, cos, sin, None, counters[0], *together, *how, seen, *last)
    for t in range(positions):
        part = slice(t, t + 1)
        made = (qkv[:, part], *norms, cos[:, part], sin[:, part])
        one = river.attend(*made, None, counters[1], *alone, *how, seen[:, :, part], *last)
        if 2 * positions <= 16:
            assert torch.equal(one, out[:, part])
        torch.testing.assert_close(one, out[:, part], atol=1e-5, rtol=1e-5)
    assert counters == [2 + positions] * 2
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("positions", [3, 10])
def test_causal_positions_see_the_slots_before_them(positions, softcap):
    qkv, made, slots = random(2, positions, 4 * 16), (None,) * 4, torch.arange(positions)
    seen = torch.ones(1, 1, positions, 14, dtype=torch.bool).tril()
    outcomes = []
    for mask, causal in ((seen, False), (None, True)):
        cache = torch.zeros(2, 1, 14, 16), torch.zeros(2, 1, 14, 16)
        how = ("none", 1e-6, False, mask, 0.25, softcap, True, causal)
        outcomes.append(river.attend(qkv, *made, slots, None, *cache, *how))
    torch.testing.assert_close(*outcomes, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "added"])
def test_attention_of_several_positions(kind, softcap):
    q, k, v = random(2, 5, 4, 16), random(2, 2, 7, 16), random(2, 2, 7, 16)
    live = torch.ones(2, 5, 7, dtype=torch.bool)
    live = live.tril() if kind == "causal" else live if kind == "none" else random(2, 5, 7) > 0
    live[1, 3] &= kind != "bool"  # (that position reads no slot)
    added = random(2, 5, 7) * (kind == "added")
    given = {"bool": live, "added": added.masked_fill(~live, -torch.inf)}.get(kind)
    out = river.attention(q, k, v, None if given is None else given[:, None], 0.25, softcap, kind == "causal")
    expected = reference.cache_attention(q, k, v, scale=0.25, softcap=softcap, mask=live, added=added)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_each_row_meets_its_expert(rows, layout):
    """Rows of one expert anywhere, unchosen experts (which hold NaN), and rows without an expert."""
    stack, x = stacked(6, 24, 96, layout), random(rows, 96)
    expert = torch.randint(-1, 5, (rows,), generator=G)
    exact = stack.dequantize(torch.float64).view(6, 24, 96)
    stack.scale_zero[5] = float("nan")
    y = river.experts(x, stack.qweight, stack.scale_zero, expert, 24, 32, layout)
    expected = torch.einsum("mnk,mk->mn", exact[expert], x.double()) * (expert >= 0)[:, None]
    assert y.shape == (rows, 24)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=TOLERANCE[torch.float32] * 3)


@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 40), st.sampled_from([32, 64]))
@examples(15)
def test_a_stack_holds_the_grid_that_it_was_packed_from(seed, experts, n, group):
    """In every layout, also with scales too large for float16."""
    weight = torch.randn(experts * n, 2 * group, generator=torch.Generator().manual_seed(seed))
    weight[: n * (seed % 2)] *= 1e6
    grid = quantize(weight, group, "rtn").rounded(torch.bfloat16)
    for layout in ("triton", "plain", "native"):
        found = pack_stack(grid, layout, experts).unpack()
        assert all(torch.equal(getattr(found, part), getattr(grid, part)) for part in ("q", "scale", "zero"))


def test_what_the_operators_refuse():
    stack = stacked(3, 16, 64, "triton")
    with pytest.raises(ValueError, match=r"it was given x \(2, 64\), expert \(3,\) and weight \(3, 16, 8\)"):
        river.experts(random(2, 64), stack.qweight, stack.scale_zero, torch.tensor([0, 1, 2]), 16, 32, "triton")
    p, x = packed(24, 64, "triton"), random(1, 64)
    with pytest.raises(ValueError, match="layout='rows' is not allowed; choose one of 'triton', 'plain'"):
        river.linear(x, p.qweight, p.scale_zero, None, 24, 32, "rows")
    with pytest.raises(ValueError, match="norm='rms' and norm_weight go together"):
        river.linear(x, p.qweight, p.scale_zero, None, 24, 32, "triton", norm="rms")
    with pytest.raises(ValueError, match="activation='swish'"):
        river.linear(x, p.qweight, p.scale_zero, None, 24, 32, "plain", activation="swish")
    with pytest.raises(ValueError, match="dtype='float64'"):
        river.linear(x.double(), p.qweight, p.scale_zero, None, 24, 32, "triton")
    with pytest.raises(ValueError, match="bias has dtype float16"):
        river.linear(x, p.qweight, p.scale_zero, random(24).half(), 24, 32, "triton")
    with pytest.raises(ValueError, match=r"qweight has shape \(24, 8\); this call needs \(25, 8\)"):
        river.linear(x, p.qweight, p.scale_zero, None, 25, 32, "triton")
    with pytest.raises(ValueError, match="qweight has shape"):
        river.linear(random(1, 96), p.qweight, p.scale_zero, None, 24, 32, "triton")
    with pytest.raises(ValueError, match="qweight has strides"):
        river.linear(x, p.qweight.T.contiguous().T, p.scale_zero, None, 24, 32, "triton")
    with pytest.raises(ValueError, match="have one shape"):
        river.residual_score(x, x, random(2, 64))


def test_what_the_cache_operators_refuse():
    k_cache, v_cache = caches()
    fill = ("none", 1e-6, False)
    slot, qkv = torch.tensor([0]), random(2, 1, 64)
    with pytest.raises(ValueError, match="cos and sin go together"):
        river.kv_fill(qkv, None, None, random(1, 16), None, slot, k_cache, v_cache, *fill)
    with pytest.raises(ValueError, match=r"q_norm has shape \(15,\)"):
        river.kv_fill(qkv, random(15), random(16), None, None, slot, k_cache, v_cache, "rms", 1e-6, False)
    with pytest.raises(ValueError, match=r"missing buffers .*k_norm"):
        river.kv_fill(qkv, None, None, None, None, slot, k_cache, v_cache, "rms", 1e-6, False)
    with pytest.raises(ValueError, match="B or D differs"):
        river.decode_attention(random(1, 2, 16), k_cache, v_cache, None, 1.0, 0.0)
    mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 5\)"):
        river.decode_attention(random(2, 2, 16), k_cache, v_cache, mask, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"slot has shape \(1,\)"):
        river.kv_fill(random(2, 2, 64), None, None, None, None, slot, k_cache, v_cache, *fill)
    with pytest.raises(ValueError, match="qkv has shape"):
        river.kv_fill(random(3, 1, 64), None, None, None, None, slot, k_cache, v_cache, *fill)
    for places in ((None, None), (slot, torch.tensor(0))):
        with pytest.raises(ValueError, match="give a slot, or a counter"):
            river.attend(qkv, None, None, None, None, *places, k_cache, v_cache, *fill, None, 1.0, 0.0)
    with pytest.raises(ValueError, match="one shape and stride"):
        river.kv_fill(qkv, None, None, None, None, slot, k_cache, v_cache[:, :, :5], *fill)
