"""4-bit matmuls on CPUs through ATen's int4 kernels.

ATen's kernel computes ``y[M, N] = x[M, K] W^T`` with ``W = (q - 8) * scale + zero``, a bfloat16 scale and zero for
each group of 32, 64, 128 or 256 input features. It is fast for bfloat16 activations alone, so other dtypes are cast
around it, and it needs N to be a multiple of 16, so rows are padded when packing (see `layouts`) and cut off after the
product.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUT = "aten_cpu"
ROWS = 16


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
