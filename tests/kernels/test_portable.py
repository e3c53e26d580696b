"""One-query attention and one-row linears in plain torch, against their definitions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from river_compile.kernels.portable import grouped_attention, one_row_linear
from tests.support.examples import examples

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@examples(40)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    repeat=st.integers(1, 4),
    length=st.integers(1, 40),
    dim=st.sampled_from([8, 24, 64]),
    mask_kind=st.sampled_from(["none", "bool", "float"]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_grouped_attention_is_attention(batch, kv_heads, repeat, length, dim, mask_kind, dtype, seed):
    """Against ATen in float64 with repeated KV heads; masked slots hold huge values."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * repeat, 1, dim, generator=generator).to(dtype)
    k, v = (torch.randn(batch, kv_heads, length, dim, generator=generator).to(dtype) for _ in range(2))
    visible = torch.rand(batch, 1, 1, length, generator=generator) < 0.7
    visible[..., -1] = True
    mask = None
    if mask_kind != "none":
        hidden = ~visible[:, 0, 0]
        k.masked_fill_(hidden[:, None, :, None], 1e4)
        v.masked_fill_(hidden[:, None, :, None], 1e4)
        mask = visible if mask_kind == "bool" else torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)
    repeated = [t.repeat_interleave(repeat, dim=1).double() for t in (k, v)]
    exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), *repeated, attn_mask=exact, scale=0.2)
    actual = grouped_attention(q, k, v, mask, 0.2)
    assert actual.dtype == dtype
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@examples(30)
@given(n=st.integers(1, 300), k=st.integers(1, 200), dtype=DTYPES, bias=st.booleans(), seed=st.integers(0, 999))
def test_one_row_linear_is_a_linear_layer(n, k, dtype, bias, seed):
    """Against float64: as close as rounding twice to the dtype allows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 1, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    b = torch.randn(n, generator=generator).to(dtype) if bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
    actual = one_row_linear(x, weight, b)
    assert actual.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), exact, rtol=2 * eps, atol=2 * eps + 1e-4)
