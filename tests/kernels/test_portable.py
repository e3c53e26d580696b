"""Operators for strict verification: every row has the very bits of a call with that row alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels import portable
from river_compile.kernels.portable import batch_invariant_attention, batch_invariant_linear
from tests.support.examples import examples

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@examples(30)
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 9),
    k=st.sampled_from([7, 64, 576, 1536]),
    n=st.sampled_from([5, 64, 200]),
    bias=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_linear_rows_have_the_bits_of_one_position_at_a_time(batch, width, k, n, bias, dtype, seed):
    x, weight = normal(batch, width, k, dtype=dtype, seed=seed), normal(n, k, dtype=dtype, seed=seed + 1)
    b = normal(n, dtype=dtype, seed=seed + 2) if bias else None
    alone = [F.linear(x[:, i : i + 1], weight, b) for i in range(width)]
    assert torch.equal(batch_invariant_linear(x, weight, b), torch.cat(alone, 1))


@examples(30)
@given(
    batch=st.integers(1, 3),
    width=st.integers(1, 6),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    grown=st.booleans(),
    masked=st.booleans(),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_attention_rows_have_the_bits_of_one_query_at_a_time(batch, width, kv_heads, group, grown, masked, dtype, seed):
    """A static cache keeps its slots and masks those after the query; a growing one ends with the query's own slot."""
    slots = width + 11
    q = normal(batch, kv_heads * group, width, 16, dtype=dtype, seed=seed)
    k, v = (normal(batch, kv_heads, slots, 16, dtype=dtype, seed=seed + i) for i in (1, 2))
    mask = torch.ones(batch, 1, width, slots, dtype=torch.bool).tril(slots - width)
    mask[-1, ..., :2] = False
    mask = mask if masked else None
    keys, values = (x[:, :, :11] if grown else x for x in (k, v))
    alone = []
    for i, (key, value) in enumerate(zip(k[:, :, 11:].split(1, 2), v[:, :, 11:].split(1, 2), strict=True)):
        if grown:  # one pass after another, each of which adds an entry and reads them all
            keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        own = None if mask is None else mask[:, :, i : i + 1, : keys.shape[2]]
        alone.append(F.scaled_dot_product_attention(q[:, :, i : i + 1], keys, values, own, enable_gqa=True))
    assert torch.equal(batch_invariant_attention(q, k, v, mask, None, True, grown), torch.cat(alone, 2))


@pytest.mark.parametrize("grown", [True, False])
def test_attention_gives_a_library_the_batch_that_a_pass_of_one_token_gives_it(grown, monkeypatch):
    """A library that rounds by the size of its batch: as some do, on some processors."""
    attention = F.scaled_dot_product_attention

    def by_batch(q, *args, **named):
        return attention(q, *args, **named) * len(q)

    monkeypatch.setattr(portable.F, "scaled_dot_product_attention", by_batch)
    q, k, v = (normal(2, 2, n, 16, dtype=torch.float32, seed=n) for n in (3, 7, 7))
    rows = batch_invariant_attention(q, k, v, None, None, False, grown)
    seen = [5, 6, 7] if grown else [7, 7, 7]
    alone = [2 * attention(q[:, :, i : i + 1], k[:, :, :n], v[:, :, :n]) for i, n in enumerate(seen)]
    assert torch.equal(rows, torch.cat(alone, 2))


@pytest.mark.parametrize("alike", [True, False])
def test_a_library_that_sums_wide_products_otherwise_is_called_row_by_row(alike, monkeypatch):
    """F.linear is replaced by one whose rounding depends on the number of rows, or does not."""
    widths = []

    def linear(x, weight, bias):
        widths.append(x.shape[1])
        out = torch.einsum("bwk,nk->bwn", x.double(), weight.double())
        return (out if alike or x.shape[1] == 1 else out * (1 + 2**-7)).to(x.dtype)

    monkeypatch.setattr(portable, "_probed", {})
    monkeypatch.setattr(portable.F, "linear", linear)
    x, weight = normal(1, 4, 32, dtype=torch.bfloat16, seed=0), normal(16, 32, dtype=torch.bfloat16, seed=1)
    rows = batch_invariant_linear(x, weight, None)
    assert widths[-1] == (4 if alike else 1)
    assert torch.equal(rows, torch.cat([linear(x[:, i : i + 1], weight, None) for i in range(4)], 1))
    before = len(widths)
    batch_invariant_linear(x, weight, None)
    assert len(widths) - before == (1 if alike else 4), "the verdict is kept for the shape"


@examples(10)
@given(width=st.integers(1, 5), grown=st.booleans())
def test_the_compiler_sees_the_shapes_that_the_operators_return(width, grown):
    x, weight = normal(2, width, 8, dtype=torch.float32, seed=0), normal(6, 8, dtype=torch.float32, seed=1)
    q = normal(2, 4, width, 8, dtype=torch.float32, seed=2)
    k = normal(2, 2, width + 3, 8, dtype=torch.float32, seed=3)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.river.batch_invariant_linear.default, (x, weight, None), test_utils=checks)
    arguments = (q, k, k.clone(), None, None, True, grown)
    torch.library.opcheck(torch.ops.river.batch_invariant_attention.default, arguments, test_utils=checks)
