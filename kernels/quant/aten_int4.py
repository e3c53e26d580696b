"""4-bit matrix products on CPUs through ATen's int4 kernels.

ATen's kernel computes ``y[M, N] = x[M, K] W^T`` with ``W = (q - 8) * scale + zero``, a bfloat16 scale and zero for
each group of 32, 64, 128 or 256 input features. It is fast for bfloat16 activations alone, so other dtypes are cast
around it, and it needs N to be a multiple of 16, so rows are padded when packing and cut off after the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import MID_POINT, QuantizedWeight

LAYOUT = "aten_cpu"
_ROWS = 16


def has_fast_kernel() -> bool:
    """Tells whether ATen has a vectorized int4 kernel for this processor; the scalar one is right and slow."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def linear_aten(
    x: Tensor, qweight: Tensor, scale_zero: Tensor, bias: Tensor | None, out_features: int, group_size: int
) -> Tensor:
    """Returns ``x W^T + bias``, ``[..., N]`` in x's dtype, for x ``[..., K]``; traceable into ATen ops alone.

    Args:
        x: ``[..., K]``, any floating dtype; it is rounded to bfloat16.
        qweight: ``[N', K / 2]`` uint8 in ATen's opaque order, N' = N rounded up to a multiple of 16.
        scale_zero: bfloat16 ``[K / group_size, N', 2]``.
        bias: ``[N]`` or None.
        out_features: N.
        group_size: 32, 64, 128 or 256.
    """
    flat = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, qweight, group_size, scale_zero)
    y = y[:, :out_features].reshape(*x.shape[:-1], out_features).to(x.dtype)
    return y if bias is None else y + bias


def pack(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Returns qweight and scale_zero of a grid, as `linear_aten` takes them."""
    pad = -weight.shape[0] % _ROWS
    q = torch.nn.functional.pad(weight.q.to(torch.int32), (0, 0, 0, pad))
    scale_zero = torch.stack([weight.scale, weight.zero], -1)
    scale_zero = torch.nn.functional.pad(scale_zero, (0, 0, 0, 0, 0, pad)).transpose(0, 1).contiguous()
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1), scale_zero.to(torch.bfloat16)


def unpack(
    qweight: Tensor, scale_zero: Tensor, out_features: int, in_features: int, group_size: int
) -> QuantizedWeight:
    """Reads the integers back by multiplying with the identity: ATen's order is private and differs by processor."""
    unit = torch.zeros_like(scale_zero)
    unit[..., 0] = 1
    eye = torch.eye(in_features, dtype=torch.bfloat16)
    q = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, qweight, group_size, unit)
    scale, zero = scale_zero[:, :out_features].float().permute(2, 1, 0).contiguous()
    return QuantizedWeight((q.T[:out_features] + MID_POINT).to(torch.uint8), scale, zero, group_size)
