"""Every kernel family in float64 with plain torch operations, for tensors of any floating dtype.

Shapes: B sequences, K and N features, H query heads, J key-value heads, D features of a head, S cache slots.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F


def norm(
    x: torch.Tensor, kind: str, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """Normalizes ``[..., K]``: "none", "rms" (Zhang and Sennrich 2019), "rms_plus_one" (Gemma), "layer" (Ba 2016)."""
    x = x.double()
    if kind == "none":
        return x
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.double()
        return y if bias is None else y + bias.double()
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y * (weight.double() + (kind == "rms_plus_one"))


def activate(x: torch.Tensor, kind: str) -> torch.Tensor:
    functions = {
        "none": lambda v: v,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
    }
    return functions[kind](x)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> torch.Tensor:
    """Returns activation(x W^T + bias) + residual; gated, with weight ``[2 N, K]``: activation(gate) * up."""
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = activate(gate, activation) * up
    else:
        y = activate(y, activation)
    return y if residual is None else y + residual.double()


def whole_table(table: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Returns a table of every feature's angle, of one with each pair's."""
    return table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of the first R features of ``[..., D]``; cos, sin as in Hugging Face models."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    r = cos.shape[-1]
    rotated, rest = x[..., :r], x[..., r:]
    if interleaved:
        turned = torch.stack([-rotated[..., 1::2], rotated[..., 0::2]], dim=-1).flatten(-2)
    else:
        turned = torch.cat([-rotated[..., r // 2 :], rotated[..., : r // 2]], dim=-1)
    return torch.cat([rotated * cos + turned * sin, rest], dim=-1)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query position ``[B, H, D]`` on a cache; bool mask and added ``[B, S]``; a fully masked row gives 0.

    Sinks ``[H]`` are the scores of one more key, whose value is 0.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = (c.double().repeat_interleave(groups, dim=1) for c in (k, v))
    scores = torch.einsum("bhd,bhsd->bhs", q.double(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added[:, None].double()
    if mask is not None:
        live = mask[:, None].expand(scores.shape)
        scores = scores.masked_fill(~live, -math.inf)
        v = v.masked_fill(~mask[:, None, :, None], 0.0)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None].expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    weights = weights if mask is None else weights.nan_to_num(0.0)
    return torch.einsum("bhs,bhsd->bhd", weights, v)


def cache_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, mask: torch.Tensor, added: torch.Tensor, **how: Any
) -> torch.Tensor:
    """The same for q ``[B, T, H, D]``; `mask` and `added` are ``[B, T, S]``."""
    k, v = (cache.repeat_interleave(q.shape[1], 0) for cache in (k, v))
    rows = {"mask": mask.flatten(0, 1), "added": added.flatten(0, 1)}
    return attention(q.flatten(0, 1), k, v, **rows, **how).view(q.shape)


def row_similarity(hidden: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Cosine of rows of ``[..., D]``; NaN for zero or non-finite rows."""
    hidden, previous = hidden.double(), previous.double()
    return (hidden * previous).sum(-1) / (hidden.norm(dim=-1) * previous.norm(dim=-1))
