"""The grids of group-wise 4-bit quantization, and signal-to-noise ratios.

A quantizer maps a weight ``[N, K]`` (rows are output features) to a :class:`QuantizedWeight`, with q in 0..15:

    w[n, k] = (q[n, k] - 8) * scale[n, k // group_size] + zero[n, k // group_size]
Not handled: how scales are chosen (`quant.data_free`, `quant.calibrated`), and the bytes of a kernel (`quant.layouts`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

MID_POINT = 8
MAX_Q = 15
GROUP_SIZES = (32, 64, 128)
NOT_FINITE = "the weight holds infinite or NaN values and cannot be quantized"
_PIECE_ELEMENTS = 32_000
_SLAB_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class QuantizedWeight:
    """The quantization parameters and integers of a 4-bit weight, before packing."""

    q: Tensor  # uint8 [N, K], values 0..15
    scale: Tensor  # float32 [N, K // group_size]
    zero: Tensor  # float32 [N, K // group_size], the weight at q == 8
    group_size: int  # consecutive input features that share scale and zero-point

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[N, K]``, computed in `dtype`."""
        n, k = self.shape
        groups = self.q.to(dtype).reshape(n, k // self.group_size, self.group_size)
        w = (groups - MID_POINT) * self.scale.to(dtype)[..., None] + self.zero.to(dtype)[..., None]
        return w.reshape(n, k)

    def to(self, device: torch.device) -> QuantizedWeight:
        q, scale, zero = (tensor.to(device) for tensor in (self.q, self.scale, self.zero))
        return replace(self, q=q, scale=scale, zero=zero)

    def rows(self, some: slice) -> QuantizedWeight:
        """Return some rows."""
        return replace(self, q=self.q[some], scale=self.scale[some], zero=self.zero[some])

    def split(self, matrices: int) -> list[QuantizedWeight]:
        """Split a stack of equal weights, one below the other."""
        parts = (tensor.chunk(matrices) for tensor in (self.q, self.scale, self.zero))
        return [QuantizedWeight(q, scale, zero, self.group_size) for q, scale, zero in zip(*parts, strict=True)]

    @staticmethod
    def stacked(grids: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Stack grids with equal columns, one below the other."""
        if len(grids) == 1:
            return grids[0]
        q, scale, zero = (torch.cat([getattr(grid, part) for grid in grids]) for part in ("q", "scale", "zero"))
        return QuantizedWeight(q, scale, zero, grids[0].group_size)

    def rounded(self, dtype: torch.dtype) -> QuantizedWeight:
        """Return the grid with scale and zero-point rounded to `dtype`, as a kernel stores them."""
        return replace(self, scale=self.scale.to(dtype).float(), zero=self.zero.to(dtype).float())


def fitting_group_size(in_features: int, requested: int) -> int:
    """Return the largest power of two that divides `in_features` and is at most `requested`."""
    return math.gcd(in_features, 1 << (requested.bit_length() - 1))


def threads_for(weight: Tensor) -> int:
    """Return how many threads quantize weights like this one: torch's on a CPU, one on a GPU."""
    # A GPU's stream serializes kernels, and each thread's float32 copies would fill its memory.
    return max(1, torch.get_num_threads()) if weight.device.type == "cpu" else 1


def check_shape(weight: Tensor, group_size: int) -> None:
    """Raise ValueError if a weight is not a matrix or `group_size` does not divide K."""
    if weight.dim() != 2:
        raise ValueError(f"a weight to quantize has 2 dimensions, this one has shape {tuple(weight.shape)}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {weight.shape[1]} input features")


def check_matrix(weight: Tensor, group_size: int) -> Tensor:
    """Return a weight in float32; raise ValueError if it is not a finite matrix or `group_size` does not divide K."""
    check_shape(weight, group_size)
    weight = weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError(NOT_FINITE)
    return weight


def sqnr_db(weight: Tensor, approximation: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels: 10 log10(sum w^2 / sum (w - approximation)^2)."""
    signal = noise = 0.0
    for part, other in zip(slabs(weight.detach()), slabs(approximation.detach()), strict=True):
        part, other = part.float(), other.float()
        signal += torch.sum(part.square(), dtype=torch.float64).item()
        noise += torch.sum((part - other).square(), dtype=torch.float64).item()
    return decibels(signal, noise)


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise), infinite without noise."""
    if noise <= 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def nearest(weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return q - 8 of the nearest grid points, in the weight's dtype."""
    return ((weight - zero) / scale).round_().clamp_(-MID_POINT, MAX_Q - MID_POINT)


def rounded_to(weight: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> QuantizedWeight:
    """Round every weight to the nearest point of its group's grid."""
    q = nearest(weight.unflatten(1, (-1, group_size)), scale[..., None], zero[..., None])
    return QuantizedWeight((q + MID_POINT).flatten(1).to(torch.uint8), scale, zero, group_size)


def slabs(weight: Tensor) -> Sequence[Tensor]:
    """Split a matrix by rows, to copy a few in higher precision at a time; other tensors stay whole."""
    if weight.dim() != 2 or weight.device.type != "cpu":
        return [weight]
    return weight.split(max(1, _SLAB_ELEMENTS // max(1, weight.shape[1])))


def pieces(weight: Tensor) -> Sequence[Tensor]:
    """Split a weight by rows for solvers that sweep over their input dozens of times."""
    # Pieces that fit a core's cache are several times faster. Below the size at which ATen starts threads, they leave
    # the other cores to other weights.
    rows = max(1, _PIECE_ELEMENTS // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    return weight.split(rows)
