"""4-bit matrix products on CPUs through ATen's int4 kernels.

ATen's kernel computes ``y[M, N] = x[M, K] W^T`` with ``W = (q - 8) * scale + zero``, a bfloat16 scale and zero for
each group of 32, 64, 128 or 256 input features. It is fast for bfloat16 activations alone, so other dtypes are cast
around it, and it needs N to be a multiple of 16, so rows are padded when packing and cut off after the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize import QuantizedWeight

LAYOUT = "aten_cpu"
_ROWS = 16


def pack_aten(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Packs a matrix for :func:`linear_aten`.

    Returns:
        qweight: ``[N', K / 2]`` uint8 in ATen's opaque order, N' = N rounded up to a multiple of 16.
        scale_zero: bfloat16 ``[K / group_size, N', 2]``.
    """
    n, _ = weight.shape
    pad = -n % _ROWS
    q = torch.nn.functional.pad(weight.q.to(torch.int32), (0, 0, 0, pad))
    scale_zero = torch.stack([weight.scale, weight.zero], -1)
    scale_zero = torch.nn.functional.pad(scale_zero, (0, 0, 0, 0, 0, pad)).transpose(0, 1).contiguous()
    qweight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    return qweight, scale_zero.to(torch.bfloat16)


def linear_aten(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """Returns ``x W^T + bias``, ``[..., N]`` in x's dtype, for x ``[..., K]``; traceable into ATen ops alone."""
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, qweight, group_size, scale_zero)
    y = y[:, :out_features].reshape(*x.shape[:-1], out_features).to(x.dtype)
    return y if bias is None else y + bias
