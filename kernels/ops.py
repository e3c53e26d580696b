"""The operators ``torch.ops.river.*``. Importing this module registers them; it needs no Triton and no GPU.

    w4a16_linear          x W^T + bias + residual, W in 4 bits
    norm_linear           a norm in front of one or several merged projections
    gated_mlp             norm, gate and up projection, activation and product
    lm_head               a large 4-bit or dense projection, optionally the final norm in front
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

from river_compile.kernels.quant import layouts as pack
from river_compile.kernels.triton import launch
from river_compile.kernels.triton.launch import Norm

_PACKED = "Tensor qweight, Tensor scale_zero, Tensor? bias, int out_features, int group_size, str layout"
_NORM = "Tensor? norm_weight, Tensor? norm_bias, str norm, float eps"


@torch.library.custom_op(
    "river::w4a16_linear", mutates_args=(), schema=f"(Tensor x, {_PACKED}, Tensor? residual=None) -> Tensor"
)
def w4a16_linear(x, qweight, scale_zero, bias, out_features, group_size, layout, residual=None):
    """Returns x W^T + bias + residual.

    Args:
        x: ``[..., K]``.
        qweight, scale_zero: as the layout packs them, see `pack`.
        bias: ``[N]`` or None.
        out_features: N.
        group_size: G.
        layout: name of the packing.
        residual: ``[..., N]`` or None.

    Returns:
        ``[..., N]`` in x.dtype, accumulated in float32.
    """
    packed = pack.PackedLinear(layout, qweight, scale_zero, group_size, x.shape[-1], out_features)
    return _run("w4a16_linear", x, packed, Norm(), bias, residual=residual)


@w4a16_linear.register_fake
def _(x, qweight, scale_zero, bias, out_features, group_size, layout, residual=None):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("river::norm_linear", mutates_args=(), schema=f"(Tensor x, {_NORM}, {_PACKED}) -> Tensor")
def norm_linear(x, norm_weight, norm_bias, norm, eps, qweight, scale_zero, bias, out_features, group_size, layout):
    """Returns norm(x) W^T + bias; W holds one projection or several merged ones (`pack.merge`).

    Args:
        x: ``[..., K]``.
        norm_weight, norm_bias: ``[K]`` in x.dtype; the bias for "layer" alone.
        norm: "rms", "rms_plus_one" (Gemma), "layer" or "none".
        eps: of the norm.
        qweight, scale_zero, bias, out_features, group_size, layout: as in `w4a16_linear`.

    Returns:
        ``[..., N]`` in x.dtype.
    """
    packed = pack.PackedLinear(layout, qweight, scale_zero, group_size, x.shape[-1], out_features)
    return _run("norm_linear", x, packed, Norm(norm, norm_weight, norm_bias, eps), bias)


@norm_linear.register_fake
def _(x, norm_weight, norm_bias, norm, eps, qweight, scale_zero, bias, out_features, group_size, layout):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op(
    "river::gated_mlp", mutates_args=(), schema=f"(Tensor x, {_NORM}, {_PACKED}, str activation, bool gated) -> Tensor"
)
def gated_mlp(
    x, norm_weight, norm_bias, norm, eps, qweight, scale_zero, bias, out_features, group_size, layout, activation, gated
):
    """Returns activation(h Wg^T + bg) * (h Wu^T + bu) with h = norm(x), or activation(h W^T + b) if not gated.

    Args:
        x, norm_weight, norm_bias, norm, eps: as in `norm_linear`.
        qweight, scale_zero: N gate rows, then N up rows; N rows if not gated.
        bias: ``[2 N]``, or ``[N]`` if not gated, or None.
        out_features: N.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "none".

    Returns:
        ``[..., N]`` in x.dtype.
    """
    rows = out_features * (2 if gated else 1)
    packed = pack.PackedLinear(layout, qweight, scale_zero, group_size, x.shape[-1], rows)
    norms = Norm(norm, norm_weight, norm_bias, eps)
    return _run("gated_mlp", x, packed, norms, bias, activation=activation, gated=gated)


@gated_mlp.register_fake
def _(
    x, norm_weight, norm_bias, norm, eps, qweight, scale_zero, bias, out_features, group_size, layout, activation, gated
):
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op(
    "river::lm_head",
    mutates_args=(),
    schema=f"(Tensor x, {_NORM}, Tensor weight, Tensor? scale_zero, Tensor? bias, int out_features, int group_size, "
    "str layout) -> Tensor",
)
def lm_head(x, norm_weight, norm_bias, norm, eps, weight, scale_zero, bias, out_features, group_size, layout):
    """Returns norm(x) W^T + bias for a large N.

    Args:
        x, norm_weight, norm_bias, norm, eps: as in `norm_linear`.
        weight: ``[N, K]`` in x.dtype where there is no scale_zero, else the packed integers.
        scale_zero: None for a weight in x.dtype.
        bias, out_features, group_size: as in `w4a16_linear`.
        layout: as there; for a weight in x.dtype "triton" (the generated kernel) or "dense" (plain torch).

    Returns:
        ``[..., N]`` in x.dtype.
    """
    norms = Norm(norm, norm_weight, norm_bias, eps)
    if scale_zero is not None:
        weight = pack.PackedLinear(layout, weight, scale_zero, group_size, x.shape[-1], out_features)
    elif layout not in ("dense", "triton"):
        raise ValueError(f"layout={layout!r} has a scale_zero; without one it is 'dense' or 'triton'")
    return _run("lm_head", x, weight, norms, bias, layout=layout)


@lm_head.register_fake
def _(x, norm_weight, norm_bias, norm, eps, weight, scale_zero, bias, out_features, group_size, layout):
    return x.new_empty((*x.shape[:-1], out_features))


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


def _run(kind, x, weight, norm, bias, *, layout=None, residual=None, activation="none", gated=False):
    run = launch.linear if (layout or weight.layout) == "triton" else _portable
    return run(kind, x, weight, norm=norm, bias=bias, residual=residual, activation=activation, gated=gated)


def _portable(_kind, x, weight, *, norm, bias, residual, activation, gated):
    """The same in plain torch, for layouts that have a linear of their own."""
    h = _normalise(x, norm)
    if isinstance(weight, pack.PackedLinear):
        y = pack.layout(weight.layout).linear(h, weight, bias)
    else:
        y = F.linear(h, weight, bias)
    gate, up = y.chunk(2, dim=-1) if gated else (y, None)
    gate = _ACTIVATIONS[activation](gate)
    y = gate if up is None else gate * up
    return y if residual is None else y + residual


def _normalise(x, norm):
    if norm.kind == "none":
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
