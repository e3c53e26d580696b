"""The operators ``torch.ops.river.*`` without a KV cache: what each computes, in plain torch, on any device.

Importing this module registers them; it needs no Triton and no GPU. :mod:`river_compile.kernels.triton.operators`
registers generated kernels for some, and the C++ kernels are separate operators (`torch.ops.river_native`).
Outputs are new tensors. Operators on a cache are in `cache_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from river_compile.kernels.checks import check_choice
from river_compile.kernels.portable import ACTIVATIONS, NORMS, fused_width, normalized, smallest_cosine
from river_compile.kernels.quant import layouts, lossless

RESCORED = 256
VOCAB_BLOCK = 16  # output features of one of `vocab_blocks`
MASKED_LOGIT = -32768.0  # exact in all dtypes; not infinite, so that further masking gives no NaN


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
    vocab_blocks: Tensor | None = None,
) -> Tensor:
    """Return ``activation(h W^T + bias) + residual``, or gated ``activation(gate) * up + residual``, with h = norm(x).

    Gated, the first half of ``h W^T + bias`` is the gate and the second half is up.

    Args:
        x: ``[..., K]``.
        weight: the integers as the layout packs them (see `layouts`); without a `scale_zero` ``[N, K]`` in x.dtype.
        scale_zero: scales and zero-points as the layout packs them, None for a weight in x.dtype.
        bias: ``[N]`` in x.dtype or None.
        out_features: N, the rows of W.
        group_size: G; 0 for a weight in x.dtype.
        layout: name of the packing; for a weight in x.dtype "triton" (which a generated kernel may read) or "dense".
            Three are lossless: "12bit" and "8bit" for the C++ kernels, and "12bit_triton" for generated ones.
        residual: ``[..., N]`` (gated ``[..., N / 2]``) in x.dtype or None.
        norm: "rms", "rms_plus_one" (Gemma), "layer" or "none".
        norm_weight, norm_bias: ``[K]`` in x.dtype; the bias for "layer" only.
        eps: of the norm.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "none".
        gated: whether W holds a gate and an up projection.
        vocab_blocks: int32 ``[1 + ceil(N / 16)]``: a count of blocks of 16 output features, then their numbers,
            ascending. Other features become `MASKED_LOGIT`, and the C++ kernels skip their weights. None computes all.

    Returns:
        ``[..., N]`` (gated ``[..., N / 2]``) in x.dtype, accumulated in float32.

    Raises:
        ValueError: an unknown layout, norm or activation, or a tensor of another shape or dtype than these;
            `vocab_blocks` with a gate, a residual, or a weight in x.dtype.
    """
    check_vocab_blocks(vocab_blocks, gated, residual, scale_zero)
    matrix = operand(x, weight, scale_zero, out_features, group_size, layout, norm, norm_weight, activation)
    h = x if norm_weight is None else normalized(x, norm, norm_weight, norm_bias, eps)
    if isinstance(matrix, layouts.PackedLinear) and (layout in layouts.LOSSLESS or matrix.unpacked):
        matrix = matrix.dequantize(torch.float32 if layout == lossless.LAYOUT_8BIT else x.dtype)
    if isinstance(matrix, layouts.PackedLinear):
        y = layouts.layout(layout).linear(h, matrix, bias)
    else:
        y = F.linear(h.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype)).to(x.dtype)
    y = _activated(y.chunk(2, dim=-1) if gated else (y,), activation)
    if vocab_blocks is not None:
        return mask_unlisted(y, vocab_blocks)
    return y if residual is None else y + residual


def check_vocab_blocks(
    vocab_blocks: Tensor | None, gated: bool, residual: Tensor | None, scale_zero: Tensor | None
) -> None:
    """Raise a ValueError for a list of blocks with a gate, a residual, or a weight in x.dtype."""
    if vocab_blocks is not None and (gated or residual is not None or scale_zero is None):
        raise ValueError("vocab_blocks is for linears with packed weights, without gate and residual")


def operand(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor | None,
    out_features: int,
    group_size: int,
    layout: str,
    norm: str,
    norm_weight: Tensor | None,
    activation: str,
) -> Tensor | layouts.PackedLinear:
    """Return the matrix that :func:`linear` multiplies by; raise as that does."""
    check_choice("norm", norm, NORMS)
    check_choice("activation", activation, tuple(ACTIVATIONS))
    if (norm == "none") != (norm_weight is None):
        raise ValueError(f"norm={norm!r} and norm_weight go together; give both or neither")
    if scale_zero is not None:
        return layouts.PackedLinear(layout, weight, scale_zero, group_size, x.shape[-1], out_features)
    if layout not in ("dense", "triton"):
        raise ValueError(f"layout={layout!r} has a scale_zero; without one it is 'dense' or 'triton'")
    return weight


def _activated(parts: Sequence[Tensor], activation: str) -> Tensor:
    """Apply an activation to one part, or to a gate, which multiplies the other part."""
    y = ACTIVATIONS[activation](parts[0])
    return y * parts[1] if len(parts) > 1 else y


def mask_unlisted(y: Tensor, vocab_blocks: Tensor) -> Tensor:
    """Set the features outside of the blocks in `vocab_blocks` to `MASKED_LOGIT`."""
    blocks = torch.arange(y.shape[-1], device=y.device) // VOCAB_BLOCK
    chosen = vocab_blocks[1:][torch.arange(len(vocab_blocks) - 1, device=y.device) < vocab_blocks[0]]
    return y.masked_fill(~torch.isin(blocks, chosen), MASKED_LOGIT)


LINEAR = torch.library.custom_op("river::linear", linear, mutates_args=())


@LINEAR.register_fake
def _(x: Tensor, _w: Any, _s: Any, _b: Any, out_features: int, _g: Any, _layout: Any, *fused: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], fused_width(out_features, fused)))


_MERGED = """(Tensor x, Tensor[] weights, Tensor[] biases, Tensor? residual=None, str norm='none',
Tensor? norm_weight=None, Tensor? norm_bias=None, float eps=1e-06, str activation='none', bool gated=False) -> Tensor"""


def merged(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual: Tensor | None = None,
    norm: str = "none",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
    activation: str = "none",
    gated: bool = False,
) -> Tensor:
    """Return `linear` for weights in x.dtype, one below the other.

    Args:
        x: ``[..., K]``.
        weights: two weights ``[N_i, K]`` or more in x.dtype; gated, the gate and the up projection.
        biases: ``[N_i]`` for each, or none at all.
        residual, norm, norm_weight, norm_bias, eps, activation, gated: as in `linear`.

    Raises:
        ValueError: as in `linear`; of generated kernels also weights whose rows no tile divides.
    """
    h = x if norm_weight is None else normalized(x, norm, norm_weight, norm_bias, eps)
    parts = [F.linear(h, w, b) for w, b in zip(weights, biases or repeat(None), strict=False)]
    y = _activated(parts if gated else (torch.cat(parts, -1),), activation)
    return y if residual is None else y + residual


MERGED = torch.library.custom_op("river::merged", merged, mutates_args=(), schema=_MERGED)


@MERGED.register_fake
def _(x: Tensor, weights: Sequence[Tensor], _biases: Any, *fused: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], fused_width(sum(map(len, weights)), fused)))


@torch.library.custom_op("river::norm", mutates_args=())
def norm(x: Tensor, norm: str, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    """Return ``norm(x) + residual``, ``[..., K]`` in x.dtype, computed in float32.

    Args:
        x: ``[..., K]``.
        norm: "rms", "rms_plus_one" (Gemma) or "layer".
        weight, bias: ``[K]`` in x.dtype; the bias for "layer" only.
        eps: of the norm.
        residual: ``[..., K]`` in x.dtype or None.

    Raises:
        ValueError: an unknown norm.
    """
    check_choice("norm", norm, NORMS[1:])
    h = normalized(x.float(), norm, weight, bias, eps)
    return (h if residual is None else h + residual).to(x.dtype)


@norm.register_fake
def _(x: Tensor, norm: str, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("river::rescore", mutates_args=())
def rescore(
    logits: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Recompute the largest logits of each row as ``norm(x) W^T + bias`` in x.dtype.

    A 4-bit head rarely misplaces the largest logit by more than `RESCORED` places, so tokens are chosen as well as with
    the 16-bit head, at a quarter of its bytes.

    Args:
        logits: ``[..., N]`` in x.dtype. The `RESCORED` largest of each row are recomputed; the C++ kernels take about
            twice as many, and fewer if some are `MASKED_LOGIT`.
        x: ``[..., K]``.
        weight: ``[N, K]`` in x.dtype.
        bias: ``[N]`` in x.dtype or None.
        norm, norm_weight, norm_bias, eps: as in `linear`.
    """
    h = x if norm_weight is None else normalized(x, norm, norm_weight, norm_bias, eps)
    largest, chosen = logits.topk(min(RESCORED, logits.shape[-1]), dim=-1, sorted=False)
    rescored = (weight[chosen].float() @ h.float().unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        rescored = rescored + bias[chosen].float()
    return logits.scatter(-1, chosen, torch.where(largest > MASKED_LOGIT, rescored.to(logits.dtype), largest))


@rescore.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def experts(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor | None,
    expert: Tensor,
    out_features: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """Return ``x[m] W[expert[m]]^T`` for every row m. Weights that no row chose are not read.

    Args:
        x: ``[M, K]``.
        weight, scale_zero: of E stacked weights, as `layouts.pack_stack` or `layouts.pack_lossless_stack` packs them.
            In layout "dense" ``[E, N, K]`` in x.dtype, which may be a view of ``[E, K, N]``, and None.
        expert: integer ``[M]``; a row with a number outside of 0 to E - 1 gets zeros.
        out_features: N, the rows of each W.
        group_size: G; 0 for weights that keep their values.
        layout: name of the packing, or "dense".

    Returns:
        ``[M, N]`` in x.dtype, accumulated in float32.

    Raises:
        ValueError: an unknown layout, or a tensor of another shape or dtype than these.
    """
    stack = expert_stack(x, weight, scale_zero, expert, out_features, group_size, layout)
    rows_of: dict[int, list[int]] = {}
    for row, chosen in enumerate(expert.tolist()):
        rows_of.setdefault(chosen, []).append(row)
    y = x.new_zeros((x.shape[0], out_features))
    for chosen, rows in rows_of.items():
        if 0 <= chosen < len(weight):
            y[rows] = _by_matrix(x[rows], weight[chosen] if stack is None else stack.matrix(chosen))
    return y


def _by_matrix(x: Tensor, matrix: Tensor | layouts.PackedLinear) -> Tensor:
    if isinstance(matrix, Tensor):
        return F.linear(x, matrix)
    if matrix.layout in layouts.LOSSLESS:
        return F.linear(x, matrix.dequantize(x.dtype))
    return layouts.layout(matrix.layout).linear(x, matrix, None)


def expert_stack(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor | None,
    expert: Tensor,
    out_features: int,
    group_size: int,
    layout: str,
) -> layouts.PackedLinear | None:
    """Return the packed weights that :func:`experts` multiplies by, None for weights in x.dtype; raise as that does."""
    if x.dim() != 2 or expert.shape != x.shape[:1] or weight.dim() < 3:
        shapes = f"x {tuple(x.shape)}, expert {tuple(expert.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"experts takes x [M, K], expert [M] and stacked weights; it was given {shapes}")
    if (scale_zero is None) != (layout == "dense"):
        raise ValueError(f"layout={layout!r} has a scale_zero unless it is 'dense'")
    if scale_zero is None:
        return None
    return layouts.PackedLinear(layout, weight, scale_zero, group_size, x.shape[1], out_features, len(weight))


EXPERTS = torch.library.custom_op("river::experts", experts, mutates_args=())


@EXPERTS.register_fake
def _(x: Tensor, _weight: Any, _scale_zero: Any, _expert: Tensor, out_features: int, *_others: Any) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


@torch.library.custom_op("river::exit_score", mutates_args=())
def exit_score(hidden: Tensor, previous: Tensor) -> Tensor:
    """Run `smallest_cosine` as one operator, the mark of an exit check in a graph."""
    return smallest_cosine(hidden, previous)


@exit_score.register_fake
def _(hidden: Tensor, previous: Tensor) -> Tensor:
    return hidden.new_empty((), dtype=torch.float32)


def residual_score(update: Tensor, residual: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    """Add a residual and measure the exit score.

    Args:
        update, residual, previous: ``[..., D]`` of one shape and dtype.

    Returns:
        hidden = residual + update ``[..., D]``, and its smallest cosine with `previous` over all rows, float32 ``[]``,
        NaN if a row has none.

    Raises:
        ValueError: tensors of different shapes.
    """
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    hidden = (residual + update).contiguous()
    return hidden, smallest_cosine(hidden, previous)


RESIDUAL_SCORE = torch.library.custom_op("river::residual_score", residual_score, mutates_args=())


@RESIDUAL_SCORE.register_fake
def _(update: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    hidden = torch.empty_like(update, memory_format=torch.contiguous_format)
    return hidden, update.new_empty((), dtype=torch.float32)
