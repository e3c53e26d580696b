"""Attention and a large matrix product for one query position, as plain tensor arithmetic.

Operators made for many rows do badly with one. A fused attention kernel splits its work over query blocks: ATen's takes
four to ten times as long on a CPU as this, and wants the KV heads repeated for grouped queries. A bfloat16 matrix
product with one row reads a large matrix at two thirds of the speed of a plain sum of products. Written as
multiply-and-sum the compiler fuses them into loops over the cache or the weights, with float32 in between.

Not handled: more than one query position, dropout, soft caps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Returns ``softmax(scale q k^T + mask) v``, ``[B, H, 1, D]`` in q's dtype, computed in float32 or wider.

    Args:
        q: ``[B, H, 1, D]``.
        k: ``[B, H_kv, S, D]``, H a multiple of H_kv; query head h reads KV head ``h // (H / H_kv)``.
        v: ``[B, H_kv, S, D_v]``.
        mask: None, or ``[B or 1, H or 1, 1, S]``: boolean (True may be read) or a float that is added.
        scale: factor of the scores, None for ``D ** -0.5``.
    """
    batch, heads, _, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(batch, kv_heads, heads // kv_heads, 1, dim).to(wide)
    scores = (grouped * k[:, :, None].to(wide)).sum(-1) * (dim**-0.5 if scale is None else scale)
    if mask is not None:
        mask = mask.expand(batch, heads, 1, length).reshape(scores.shape)
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    out = (weights[..., None] * v[:, :, None].to(wide)).sum(-2)
    return out.reshape(batch, heads, 1, v.shape[-1]).to(q.dtype)


def one_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns ``x W^T + bias``, ``[..., N]`` in x's dtype, computed in float32 or wider.

    Args:
        x: ``[..., K]`` with one row in all.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (weight.to(wide) * x.reshape(1, -1).to(wide)).sum(-1)
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
