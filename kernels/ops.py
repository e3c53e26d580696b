"""The operators ``torch.ops.river.*``. Importing this module registers them; it needs no Triton and no GPU.

    linear                x W^T with W in 4 or 16 bits; a norm before it, bias, activation, gate and residual after it
    kv_fill               q|k|v -> bias, qk-norm, rotary embedding, cache slot; returns q and mutates the caches
    decode_attention      one query position over a static cache
    exit_score            smallest cosine of two hidden states, plain torch on any device
    residual_score        the same fused with the residual add
    residual_exit_score   the same with the decision: fused with the residual add and the threshold

Layout "triton" runs the generated kernel: compiled on a GPU, in Triton's interpreter on the CPU (slow, for tests).
Every other layout is plain torch around the layout's own linear. An operator never falls from the one to the other by
itself. All outputs are new tensors; what is mutated says the schema.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from river_compile.kernels.quant import layouts
from river_compile.kernels.triton import launch
from river_compile.kernels.triton.launch import Norm


@torch.library.custom_op("river::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    layout: str,
    residual: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """Returns ``activation(h W^T + bias) + residual``, or gated ``activation(gate) * up + residual``, with h = norm(x).

    Gated, the first half of ``h W^T + bias`` is the gate and the second half is up.

    Args:
        x: ``[..., K]``.
        weight: the integers as the layout packs them (see `layouts`); without a `scale_zero` ``[N, K]`` in x.dtype.
        scale_zero: scales and zeros as the layout packs them, None for a weight in x.dtype.
        bias: ``[N]`` in x.dtype or None.
        out_features: N, the rows of W.
        group_size: G; 0 for a weight in x.dtype.
        layout: name of the packing; for a weight in x.dtype "triton" (the generated kernel) or "dense" (plain torch).
        residual: ``[..., N]`` (gated ``[..., N / 2]``) in x.dtype or None.
        norm: "rms", "rms_plus_one" (Gemma), "layer" or "none".
        norm_weight, norm_bias: ``[K]`` in x.dtype; the bias for "layer" alone.
        eps: of the norm.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "none".
        gated: whether W holds a gate and an up projection.

    Returns:
        ``[..., N]`` (gated ``[..., N / 2]``) in x.dtype, accumulated in float32.

    Raises:
        ValueError: an unknown layout, norm or activation, or a tensor of another shape or dtype than these.
    """
    matrix: Tensor | layouts.PackedLinear = weight
    if scale_zero is not None:
        matrix = layouts.PackedLinear(layout, weight, scale_zero, group_size, x.shape[-1], out_features)
    elif layout not in ("dense", "triton"):
        raise ValueError(f"layout={layout!r} has a scale_zero; without one it is 'dense' or 'triton'")
    norms = Norm(norm, norm_weight, norm_bias, eps)
    run = launch.linear if layout == "triton" else _portable
    return run(x, matrix, norm=norms, bias=bias, residual=residual, activation=activation, gated=gated)


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    layout: str,
    residual: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features // 2 if gated else out_features))


@torch.library.custom_op(
    "river::kv_fill",
    mutates_args=("k_cache", "v_cache"),
    schema="(Tensor qkv, Tensor? bias, Tensor? q_norm, Tensor? k_norm, Tensor? cos, Tensor? sin, Tensor slot, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, str norm, float eps, bool interleaved) -> Tensor",
)
def kv_fill(qkv, bias, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, norm, eps, interleaved):
    """Splits q|k|v of one position, transforms the heads, writes one slot of the caches and returns the query.

    Args:
        qkv: ``[B, (H + 2 J) D]``, or any leading shape of B elements.
        bias: ``[(H + 2 J) D]`` or None.
        q_norm, k_norm: ``[D]`` weights of the heads' norm, or None.
        cos, sin: ``[..., R]`` with 1 or B rows, as Hugging Face models give them; None for no rotary embedding.
        slot: int32 or int64, one element: the slot to write. Outside of 0..S - 1 nothing is written.
        k_cache, v_cache: ``[B, J, S, D]`` in qkv.dtype, features contiguous. Mutated.
        norm: "rms" or "rms_plus_one" where q_norm and k_norm are given, else "none".
        eps: of the norm.
        interleaved: whether rotated pairs are neighbours instead of R / 2 apart.

    Returns:
        The query ``[B, H, D]`` in qkv.dtype.
    """
    return launch.fill_kv(qkv, bias, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, norm, eps, interleaved)


@kv_fill.register_fake
def _(qkv, bias, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, norm, eps, interleaved):
    b, kv_heads, _, d = k_cache.shape
    return qkv.new_empty((b, qkv.shape[-1] // d - 2 * kv_heads, d))


@torch.library.custom_op(
    "river::decode_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? length, Tensor? mask, float scale, int window, "
    "float softcap) -> Tensor",
)
def decode_attention(q, k_cache, v_cache, length, mask, scale, window, softcap):
    """Attends from one query position to the slots of a static cache.

    Args:
        q: ``[B, H, D]``.
        k_cache, v_cache: ``[B, J, S, D]`` in q.dtype, features contiguous; J divides H.
        length: int32 or int64, one element: slots that count, the query's own being the last; None for all.
        mask: ``[B, S]``: bool, True for slots that take part, or floating, added to the scores, where at most half of
            the dtype's least number leaves a slot out. None for all. A row without any slot gives 0.
        scale: of the scores.
        window: slots that a query sees, its own included; 0 for all. It needs a length.
        softcap: c in c tanh(score / c); 0 for none.

    Returns:
        ``[B, H, D]`` in q.dtype.
    """
    return launch.run_attention(q, k_cache, v_cache, length, mask, scale, window, softcap)


@decode_attention.register_fake
def _(q, k_cache, v_cache, length, mask, scale, window, softcap):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def smallest_cosine(hidden, previous):
    """Returns the smallest cosine similarity between a block's output and its input, over all rows, traceable.

    Args:
        hidden, previous: ``[..., D]``.

    Returns:
        A float32 scalar tensor, computed in float32. A row that is zero or not finite makes it NaN, which exceeds no
        threshold.
    """
    hidden, previous = hidden.float(), previous.float()
    norms = hidden.norm(dim=-1) * previous.norm(dim=-1)
    return ((hidden * previous).sum(-1) / norms).amin()


@torch.library.custom_op("river::exit_score", mutates_args=(), schema="(Tensor hidden, Tensor previous) -> Tensor")
def exit_score(hidden, previous):
    """Runs `smallest_cosine` as one operator, the mark of an exit check in a graph."""
    return smallest_cosine(hidden, previous)


@exit_score.register_fake
def _(hidden, previous):
    return hidden.new_empty((), dtype=torch.float32)


@torch.library.custom_op(
    "river::residual_exit_score",
    mutates_args=(),
    schema="(Tensor update, Tensor residual, Tensor previous, Tensor threshold) -> (Tensor, Tensor, Tensor, Tensor)",
)
def residual_exit_score(update, residual, previous, threshold):
    """Adds a residual and decides whether every row may exit, in one launch (on the CPU: in Triton's interpreter).

    Args:
        update, residual, previous: ``[..., D]`` of one dtype.
        threshold: float32, one element.

    Returns:
        hidden = residual + update ``[..., D]``; the similarity of every row to `previous`, float32 ``[...]``; the
        smallest of them, float32 ``[]``; and whether it exceeds the threshold, bool ``[]`` (NaN does not).
    """
    results = launch.residual_score(update, residual, previous, threshold)
    return tuple(results[name] for name in ("hidden", "similarity", "score", "flag"))


@residual_exit_score.register_fake
def _(update, residual, previous, threshold):
    hidden = torch.empty_like(update, memory_format=torch.contiguous_format)
    rows = update.new_empty(update.shape[:-1], dtype=torch.float32)
    return hidden, rows, rows.new_empty(()), rows.new_empty((), dtype=torch.bool)


@torch.library.custom_op(
    "river::residual_score",
    mutates_args=(),
    schema="(Tensor update, Tensor residual, Tensor previous) -> (Tensor, Tensor)",
)
def residual_score(update, residual, previous):
    """Adds a residual and measures the exit score, in one launch (on the CPU: in Triton's interpreter).

    Args:
        update, residual, previous: ``[..., D]`` of one dtype.

    Returns:
        hidden = residual + update ``[..., D]``, and its smallest similarity to `previous` over all rows, float32
        ``[]``, NaN where a row has none.
    """
    results = launch.residual_score(update, residual, previous, None)
    return results["hidden"], results["score"]


@residual_score.register_fake
def _(update, residual, previous):
    hidden = torch.empty_like(update, memory_format=torch.contiguous_format)
    return hidden, update.new_empty((), dtype=torch.float32)


def _portable(
    x: Tensor,
    weight: Tensor | layouts.PackedLinear,
    *,
    norm: Norm,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    gated: bool,
) -> Tensor:
    """The same in plain torch, for layouts that have a linear of their own."""
    h = _normalise(x, norm)
    if isinstance(weight, layouts.PackedLinear):
        y = layouts.layout(weight.layout).linear(h, weight, bias)
    else:
        y = F.linear(h, weight, bias)
    gate, up = y.chunk(2, dim=-1) if gated else (y, None)
    gate = _ACTIVATIONS[activation](gate)
    y = gate if up is None else gate * up
    return y if residual is None else y + residual


def _normalise(x: Tensor, norm: Norm) -> Tensor:
    if norm.weight is None:
        return x
    h, weight = x.float(), norm.weight.float()
    if norm.kind == "layer":
        return F.layer_norm(h, h.shape[-1:], weight, None if norm.bias is None else norm.bias.float(), norm.eps).to(x)
    return F.rms_norm(h, h.shape[-1:], weight + (norm.kind == "rms_plus_one"), norm.eps).to(x)


_ACTIVATIONS = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
}
