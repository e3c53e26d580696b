"""Fits of 4-bit grids: the scale and zero-point of each group with the least weighted squared error.

Not handled: errors of outputs, which depend on several groups (`quant.calibrated`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.kernels.native import load as native
from river_compile.kernels.quant.grid import MAX_Q, MID_POINT, QuantizedWeight, nearest, pieces, rounded_to

_SHRINKS = tuple(1 - 0.04 * i for i in range(1, 13))  # shares of a group's range, down to about a half
_REFITS = 2


def fit_grid(
    weight: Tensor, group_size: int, importance: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Fit scale and zero-point, float32 ``[N, K / group_size]``, by least squares with weights importance ``[K]``."""
    weights_G = importance.reshape(1, -1, group_size)
    # Without any input, all columns of a group count alike.
    weights_G = torch.where(weights_G.sum(-1, keepdim=True) > 0, weights_G, torch.ones_like(weights_G))
    weights_G = weights_G / weights_G.sum(-1, keepdim=True)
    if native.can_pack(weight, group_size, dtype):
        return native.fit_grid(weight, group_size, weights_G.flatten().float(), dtype)
    fitted = [_fit(piece.unflatten(1, (-1, group_size)), weights_G, dtype) for piece in pieces(weight)]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted])


def round_to_grid(
    weight: Tensor, group_size: int, importance: Tensor, dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Round every weight to the nearest point of the grid of `fit_grid`."""
    return rounded_to(weight, *fit_grid(weight, group_size, importance, dtype), group_size)


def spanning_grid(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and zero-point from the least to the largest weight of each group ``[..., G]``."""
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / MAX_Q
    return storable_grid(scale, low + MID_POINT * scale, low, dtype)


def storable_grid(scale: Tensor, zero: Tensor, low: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a grid to `dtype`; in a constant group, of weights `low`, q = 8 is exact."""
    scale = scale.to(dtype).float()
    constant = scale < torch.finfo(torch.float32).tiny
    zero = torch.where(constant, low, zero).to(dtype).float()
    return torch.where(constant, torch.ones_like(scale), scale), zero


def _fit(groups: Tensor, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fit groups ``[n, K / G, G]`` with importance ``[1, K / G, G]`` that sums to one in each group."""
    low, high = groups.amin(-1), groups.amax(-1)
    best = spanning_grid(groups, dtype)
    least = _noise(groups, *best, importance)
    for step in range(len(_SHRINKS) + _REFITS):
        if step < len(_SHRINKS):
            scale = (high - low) * _SHRINKS[step] / MAX_Q
            zero = (low + high + scale) / 2
        else:
            scale, zero = _least_squares(groups, *best, importance)
        other = storable_grid(scale, zero, low, dtype)
        noise = _noise(groups, *other, importance)
        improved = noise < least
        best = torch.where(improved, other[0], best[0]), torch.where(improved, other[1], best[1])
        least = torch.where(improved, noise, least)
    return best


def _least_squares(groups: Tensor, scale: Tensor, zero: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the best scale and zero-point of a grid's integers, by weighted least squares."""
    q = nearest(groups, scale[..., None], zero[..., None])
    mean_q, mean_w = (q * importance).sum(-1), (groups * importance).sum(-1)
    spread = q - mean_q[..., None]
    variance = (spread.square() * importance).sum(-1)
    slope = (spread * groups * importance).sum(-1) / variance
    slope = torch.where((variance > 0) & (slope > 0), slope, scale)
    return slope, mean_w - slope * mean_q


def _noise(groups: Tensor, scale: Tensor, zero: Tensor, importance: Tensor) -> Tensor:
    scale, zero = scale[..., None], zero[..., None]
    return ((nearest(groups, scale, zero) * scale + zero - groups).square() * importance).sum(-1)
