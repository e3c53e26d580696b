"""Plain torch for norms, for one query position, for attention over a cache, and for scores of logits.

Not handled: dropout, soft caps and causal flags of one position (a mask can express the last), linear layers of several
rows, and temperatures or other processing of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("none", "rms", "rms_plus_one", "layer")  # "rms_plus_one" is Gemma's
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
}


def normalized(x: Tensor, norm: str, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Return a norm of `NORMS` but "none" of x ``[..., K]``, in x.dtype, computed in float32."""
    h, weight = x.float(), weight.float()
    if norm == "layer":
        return F.layer_norm(h, h.shape[-1:], weight, None if bias is None else bias.float(), eps).to(x.dtype)
    return F.rms_norm(h, h.shape[-1:], weight + (norm == "rms_plus_one"), eps).to(x.dtype)


# Fused attention splits its work over query blocks, and matmuls read a weight more slowly than a multiply-and-sum,
# which Inductor fuses into one loop over the cache or the weight.


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return ``softmax(scale q k^T + mask) v``, ``[B, H, 1, D]`` in q's dtype, computed in float32 or wider."""
    # q [B, H, 1, D]; k, v [B, H_kv, S, D], where head h reads h // (H / H_kv); mask [B or 1, H or 1, 1, S], bool or
    # added.
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


def cache_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    sinks: Tensor | None = None,
) -> Tensor:
    """Run ``river::attention``, with all scores in memory, in float32."""
    k, v = (cache.float().repeat_interleave(q.shape[2] // cache.shape[1], 1) for cache in (k_cache, v_cache))
    scores = q.transpose(1, 2).float() @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nothing = scores.amax(-1, keepdim=True) == -torch.inf
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]].masked_fill(nothing, 0.0)
    return (weights @ v).transpose(1, 2).contiguous().to(q.dtype)


def one_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` for x ``[..., K]`` with one row, in x's dtype, computed in float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = (weight.to(wide) * x.reshape(1, -1).to(wide)).sum(-1)
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def smallest_cosine(hidden: Tensor, previous: Tensor) -> Tensor:
    """Return the smallest cosine of the rows of ``[..., D]``, float32 ``[]``; NaN for a zero or non-finite row."""
    hidden, previous = hidden.float(), previous.float()
    norms = hidden.norm(dim=-1) * previous.norm(dim=-1)
    cosines: Tensor = (hidden * previous).sum(-1) / norms
    return cosines.amin()


def largest_entropy(logits: Tensor) -> Tensor:
    """Return the largest entropy in nats of softmax(logits ``[B, T, V]``) at the last position, float32 ``[]``."""
    return entropies(logits[:, -1]).amax()


def entropies(logits: Tensor) -> Tensor:
    """Return the entropies in nats ``[N]`` of rows of logits ``[N, V]``; NaN for a row with a NaN."""
    rows = logits.to(torch.float32)
    shifted = rows - rows.amax(-1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(-1)
    # log(sum e^z) - sum(z e^z) / sum(e^z), with z the shifted logits. The clamp avoids 0 * -inf for masked tokens.
    spread = (weights * shifted.clamp(min=-1e4)).sum(-1)
    return total.log() - spread / total


def fused_width(out_features: int, fused: Sequence[object]) -> int:
    """Return the columns of a linear's output; `fused`: the operator's given arguments from `residual` on."""
    return out_features // 2 if any(fused[6:7]) else out_features  # fused[6] is `gated`


def route_like(logits: Tensor, each: int, floats: bool) -> tuple[Tensor, Tensor]:
    """Return tensors of the shapes and dtypes of `route`'s results."""
    shape = (logits.shape[0], each)
    weight = logits.new_empty(shape, dtype=torch.float32 if floats else logits.dtype)
    return weight, logits.new_empty(shape, dtype=torch.int64)


def token_kl(reference: Tensor, other: Tensor) -> Tensor:
    """Return KL(reference || other) in nats of each row of logits ``[tokens, V]``."""
    p, q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
