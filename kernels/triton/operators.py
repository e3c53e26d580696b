"""Registers generated kernels for the operators of `ops` and `cache_ops`, by importing this module.

On a GPU they are compiled; on a CPU they run in Triton's interpreter, which is slow and for tests. What they do not
compute is left to plain torch: other layouts than Triton's, and more than `MAX_EXACT_ROWS` rows of 16-bit and 12-bit
weights, which a library multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from river_compile.kernels import MAX_EXACT_ROWS, cache_ops, ops
from river_compile.kernels.quant import lossless
from river_compile.kernels.quant.layouts import PackedLinear
from river_compile.kernels.triton import calls_cache, calls_linear

_DEVICES = ("cuda", "cpu")
_LAYOUT = "triton"


@ops.LINEAR.register_kernel(_DEVICES)
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
    """Run `ops.linear`, by a kernel if it has a layout of theirs and few rows, or 4-bit weights."""
    fused = residual, norm, norm_weight, norm_bias, eps, activation, gated
    in_4_bits = layout == _LAYOUT and scale_zero is not None
    if not in_4_bits and not (layout in (_LAYOUT, lossless.LAYOUT_12BIT_TRITON) and _is_few(x)):
        return ops.linear(x, weight, scale_zero, bias, out_features, group_size, layout, *fused, vocab_blocks)
    ops.check_vocab_blocks(vocab_blocks, gated, residual, scale_zero)
    matrix = ops.operand(x, weight, scale_zero, out_features, group_size, layout, norm, norm_weight, activation)
    if isinstance(matrix, PackedLinear) and matrix.unpacked:
        matrix = matrix.dequantize(x.dtype)
    y = calls_linear.linear(x, matrix, bias, *fused)
    return y if vocab_blocks is None else ops.mask_unlisted(y, vocab_blocks)


@ops.MERGED.register_kernel(_DEVICES)
def merged(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *fused: Any) -> Tensor:
    """Run `ops.merged`, by a kernel for few rows."""
    multiply = calls_linear.linear if _is_few(x) else ops.merged
    return multiply(x, weights, biases, *fused)


@ops.EXPERTS.register_kernel(_DEVICES)
def experts(
    x: Tensor,
    weight: Tensor,
    scale_zero: Tensor | None,
    expert: Tensor,
    out_features: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """Run `ops.experts`, by a kernel in Triton's layout."""
    if layout != _LAYOUT:
        return ops.experts(x, weight, scale_zero, expert, out_features, group_size, layout)
    stack = ops.expert_stack(x, weight, scale_zero, expert, out_features, group_size, layout)
    assert stack is not None
    return calls_linear.experts(x, stack, expert)


ops.RESIDUAL_SCORE.register_kernel(_DEVICES, calls_linear.residual_score)
cache_ops.KV_FILL.register_kernel(_DEVICES, calls_cache.kv_fill)
cache_ops.ATTEND.register_kernel(_DEVICES, calls_cache.attend)
cache_ops.DECODE_ATTENTION.register_kernel(_DEVICES, calls_cache.decode_attention)


def _is_few(x: Tensor) -> bool:
    """Whether kernels multiply these rows, and not a library."""
    return x.numel() <= MAX_EXACT_ROWS * x.shape[-1]
