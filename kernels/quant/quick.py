"""The quantizer "mse" and the packing of the layout "native" in one reading of the weights, in C++.

Not handled: other layouts and devices (`quant.data_free`, then `quant.layouts`).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from river_compile.kernels.native import load as native
from river_compile.kernels.quant.grid import GROUP_SIZES, NOT_FINITE, decibels, threads_for
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT, PackedLinear, tensors_of

_ELEMENTS = 1 << 22  # of a weight that one thread packs
_BLOCK = 16  # output features whose bytes lie together


def can_pack_mse(weight: Tensor, group_size: int, layout: str) -> bool:
    """Whether `pack_mse` takes a weight, or a stack of weights."""
    fits = layout == NATIVE_LAYOUT and group_size in GROUP_SIZES and not weight.shape[-1] % group_size
    return fits and weight.dtype in native.DTYPES and weight.device.type == "cpu" and native.has_packing()


def pack_mse(weight: Tensor, group_size: int) -> tuple[PackedLinear, float]:
    """Quantize and pack a weight ``[N, K]``, or a stack ``[E, N, K]``; return it with its SQNR in dB.

    Raises ValueError if a value is infinite or NaN.
    """
    *stack, n, k = weight.shape
    experts = stack[0] if stack else 0
    shapes = tensors_of(NATIVE_LAYOUT, n, k, group_size).values()
    lines, scale_zero = (torch.empty((*stack, *shape), dtype=dtypes[0]) for shape, dtypes in shapes)
    whole = weight.detach(), lines, scale_zero
    triples = zip(*whole, strict=True) if experts else [whole]
    energies = [_fill(matrix, group_size, *to) for matrix, *to in triples]
    signal, noise = map(sum, zip(*energies, strict=True))
    return PackedLinear(NATIVE_LAYOUT, lines, scale_zero, group_size, k, n, experts), decibels(signal, noise)


def _fill(matrix: Tensor, group_size: int, lines: Tensor, scale_zero: Tensor) -> tuple[float, float]:
    """Fill a matrix's bytes; return the sums of the squares of its weights and of their errors."""
    matrix = matrix.contiguous()
    n, k = matrix.shape
    rows = max(_BLOCK, _ELEMENTS // k // _BLOCK * _BLOCK)

    def fill(start: int) -> tuple[float, float]:
        blocks = slice(start // _BLOCK, (start + rows) // _BLOCK)
        found = native.pack_mse(matrix[start : start + rows], group_size, lines[blocks], scale_zero[blocks])
        if found is None:
            raise ValueError(NOT_FINITE)
        return found

    if n <= rows:
        return fill(0)
    with ThreadPoolExecutor(threads_for(matrix)) as pool:
        signal, noise = map(sum, zip(*pool.map(fill, range(0, n, rows)), strict=True))
    return signal, noise
