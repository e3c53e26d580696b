"""Plain torch for what no generated kernel computes: one query position, scores.

One query position. Operators made for many rows do badly with one: a fused attention kernel splits its work over query
blocks, and a matrix product reads a large matrix slower than a plain sum of products. Written as multiply-and-sum,
Inductor fuses them into loops over the cache or the weights, with float32 in between.

Not handled: dropout, soft caps, causal flags (a mask says the same), matrix products other than linear layers, and
temperatures or other processing that generation applies to the logits afterwards.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

# Two orders of summation disagree in about one of 10,000 bfloat16 outputs.
_PROBED_OUTPUTS = 200_000
_MOST_TRIALS = 512

_probed: dict[tuple[object, ...], bool] = {}
_probing = threading.Lock()


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


def attention_of_several(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """Attends from several query positions, ``[B, T, H, D]``, with all scores at once, in float32.

    Args and result as of the operator ``river::attention``.
    """
    k, v = (cache.float().repeat_interleave(q.shape[2] // cache.shape[1], 1) for cache in (k_cache, v_cache))
    scores = q.transpose(1, 2).float() @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1).masked_fill(scores.amax(-1, keepdim=True) == -torch.inf, 0.0)
    return (weights @ v).transpose(1, 2).contiguous().to(q.dtype)


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


def smallest_cosine(hidden: Tensor, previous: Tensor) -> Tensor:
    """Returns the smallest cosine similarity between a block's output and its input, over all rows, traceable.

    Args:
        hidden, previous: ``[..., D]``.

    Returns:
        A float32 scalar tensor, computed in float32. A row that is zero or not finite makes it NaN, which exceeds no
        threshold.
    """
    hidden, previous = hidden.float(), previous.float()
    norms = hidden.norm(dim=-1) * previous.norm(dim=-1)
    cosines: Tensor = (hidden * previous).sum(-1) / norms
    return cosines.amin()


def largest_entropy(logits: Tensor) -> Tensor:
    """Returns the largest entropy over rows of softmax(logits) at the last position, a float32 scalar, in nats.

    With z the logits less their maximum, the entropy is ``log(sum e^z) - sum(z e^z) / sum(e^z)``; a logit of -inf adds
    nothing to it. A row with a NaN makes the result NaN.

    Args:
        logits: ``[B, T, V]``, floating point.
    """
    return entropies(logits[:, -1]).amax()


def entropies(logits: Tensor) -> Tensor:
    """Returns the entropies ``[N]`` of rows of logits ``[N, V]`` as :func:`largest_entropy` has them."""
    rows = logits.to(torch.float32)
    shifted = rows - rows.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1)
    # (0 * -inf would be NaN: a token that cannot come counts with a finite number times zero)
    spread = (weights * shifted.clamp(min=-1e4)).sum(-1)
    return total.log() - spread / total


def fused_width(out_features: int, fused: Sequence[object]) -> int:
    """Returns the columns of a linear layer's output.

    Args:
        out_features: rows of the weight.
        fused: the operator's arguments from `residual` on, as far as they were given: residual, norm, norm_weight,
            norm_bias, eps, activation, gated.
    """
    return out_features // 2 if any(fused[6:7]) else out_features


def token_kl(reference: Tensor, other: Tensor) -> Tensor:
    """Returns KL(reference || other) in nats of each row of logits ``[tokens, V]``."""
    p, q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
