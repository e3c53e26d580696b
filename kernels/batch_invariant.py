"""Matrix products and attention whose result for a token does not depend on how many tokens share the pass.

A matrix library sums in another order for eight rows than for one, and an attention kernel for eight queries than for
one, so in bfloat16 a pass over several tokens gives other bits than one pass per token. These operators give the bits
of one token per pass:

    same_rows_linear      all rows in one product where the library is found to sum them as it sums one, else one
                          product per token position
    same_rows_attention   one call per query position: batching them saves 2 to 5 % of their time, and on some
                          processors a library rounds a batch of problems otherwise than one

What the library does with a wide product is found out once for a shape, by comparing many random ones to the bit.

Not handled: causal flags (a mask says the same), dropout, matrix products other than linear layers.
"""

from __future__ import annotations

import functools
import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

# Two orders of summation disagree in about one of 10,000 bfloat16 outputs.
_PROBED_OUTPUTS = 200_000
_MOST_TRIALS = 512

_probed: dict[tuple, bool] = {}
_probing = threading.Lock()


@torch.library.custom_op(
    "river::same_rows_linear", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor"
)
def same_rows_linear(x, weight, bias):
    """Returns x W^T + bias with the bits that ``F.linear(x[:, i : i + 1], weight, bias)`` gives for each i.

    Args:
        x: ``[B, W, K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.

    Returns:
        ``[B, W, N]`` in x.dtype.
    """
    if x.shape[1] == 1 or _sums_alike(x, weight, bias):
        return F.linear(x, weight, bias)
    return torch.cat([F.linear(column, weight, bias) for column in x.split(1, dim=1)], dim=1)


@same_rows_linear.register_fake
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _sums_alike(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether the library gives a wide product's rows the bits of products with one token position."""
    key = (*x.shape, *weight.shape, weight.stride(), x.dtype, x.device, bias is None, torch.get_num_threads())
    with _probing:
        if key not in _probed:
            _probed[key] = _probe(x, weight, bias)
        return _probed[key]


def _probe(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    generator = torch.Generator(x.device).manual_seed(0)
    outputs = x.shape[0] * x.shape[1] * weight.shape[0]
    for _ in range(min(math.ceil(_PROBED_OUTPUTS / outputs), _MOST_TRIALS)):
        trial = torch.randn(x.shape, generator=generator, device=x.device, dtype=torch.float32).to(x.dtype)
        wide = F.linear(trial, weight, bias)
        narrow = torch.cat([F.linear(column, weight, bias) for column in trial.split(1, dim=1)], dim=1)
        if not torch.equal(wide, narrow):
            return False
    return True


@torch.library.custom_op(
    "river::same_rows_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, bool enable_gqa, bool grown) -> Tensor",
)
def same_rows_attention(q, k, v, mask, scale, enable_gqa, grown):
    """Returns attention with the bits that each query position has in a pass of its own.

    Args:
        q: ``[B, H, W, D]``; its positions are the last W of the cache.
        k, v: ``[B, H or H_kv, S, D]``.
        mask: ``[B or 1, H or 1, W, S]``, as `torch.nn.functional.scaled_dot_product_attention` takes it, or None.
        scale: of the scores, None for ``D ** -0.5``.
        enable_gqa: as there.
        grown: True where the cache grows by every token: a pass of one token would see a shorter one.

    Returns:
        ``[B, H, W, D]`` in q.dtype.
    """
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=enable_gqa)
    width, slots = q.shape[2], k.shape[2]
    columns = []
    for i in range(width):
        seen = slots - width + 1 + i if grown else slots
        own = None if mask is None else mask[:, :, i : i + 1, :seen]
        columns.append(attend(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], own))
    return torch.cat(columns, dim=2)


@same_rows_attention.register_fake
def _(q, k, v, mask, scale, enable_gqa, grown):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
