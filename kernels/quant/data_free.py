"""Quantizers that read weights alone: round-to-nearest, the least squared error, HQQ, and symmetric.

Not handled: calibration inputs (`quant.calibrated`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from river_compile.kernels.checks import check_choice
from river_compile.kernels.quant.fit import round_to_grid, spanning_grid
from river_compile.kernels.quant.grid import (
    MAX_Q,
    MID_POINT,
    QuantizedWeight,
    check_matrix,
    nearest,
    pieces,
    rounded_to,
    slabs,
    threads_for,
)

QUANTIZERS = ("hqq", "mse", "rtn", "symmetric")
_SHARES = tuple(1 - 0.03 * i for i in range(12))  # of a group's range, that a symmetric grid covers


def quantize(weight: Tensor, group_size: int, quantizer: str = "hqq") -> QuantizedWeight:
    """Quantize a finite weight ``[N, K]``; `group_size` divides K. Raises ValueError as `check_matrix`."""
    check_choice("quantizer", quantizer, QUANTIZERS)
    solve = {"hqq": _hqq, "mse": _mse, "rtn": _rtn, "symmetric": _symmetric}[quantizer]

    def solve_slab(slab: Tensor) -> QuantizedWeight:
        return QuantizedWeight.stacked([solve(piece, group_size) for piece in pieces(check_matrix(slab, group_size))])

    parts = slabs(weight)
    if len(parts) == 1:
        return solve_slab(weight)
    with ThreadPoolExecutor(threads_for(weight)) as pool:
        return QuantizedWeight.stacked(list(pool.map(solve_slab, parts)))


def _rtn(weight: Tensor, group_size: int) -> QuantizedWeight:
    return rounded_to(weight, *spanning_grid(weight.unflatten(1, (-1, group_size)), torch.float32), group_size)


def _hqq(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Run torchao's solver (Badri and Shaji 2023); a contract test pins its private function."""
    how = {"nbits": 4, "group_size": group_size, "axis": 1, "compute_dtype": torch.float32}
    q, scale, zero, _shape = _torchao_hqq()(weight, device=weight.device.type, **how)
    start = _rtn(weight, group_size)
    q, scale, zero = q.reshape(start.q.shape), scale.reshape(start.scale.shape), zero.reshape(start.zero.shape)
    # HQQ divides by the group's range and caps the quotient: (nearly) constant groups keep the exact grid instead.
    groups = weight.unflatten(1, (-1, group_size))
    usable = (groups.amax(-1) - groups.amin(-1) > MAX_Q / 2e4) & torch.isfinite(scale) & torch.isfinite(zero)
    return QuantizedWeight(
        torch.where(usable.repeat_interleave(group_size, dim=1), q, start.q),
        torch.where(usable, scale, start.scale),
        torch.where(usable, zero, start.zero),
        group_size,
    )


def _mse(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Round to the grid with the least squared error whose parameters are bfloat16."""
    return round_to_grid(weight, group_size, torch.ones(weight.shape[1], device=weight.device), torch.bfloat16)


def _symmetric(weight: Tensor, group_size: int) -> QuantizedWeight:
    """Round to multiples -8..7 of a scale, whose sign maps the largest weight to -8; zero-point 0."""
    groups = weight.unflatten(1, (-1, group_size))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    # Each group takes the clipping of its largest weights with the least squared error.
    best, least = torch.ones_like(largest), torch.full_like(largest, math.inf)
    for share in _SHARES:
        scale = (largest * (share / -MID_POINT)).bfloat16().float()
        scale = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 1.0, scale)[..., None]
        noise = (groups - nearest(groups, scale, torch.zeros_like(scale)) * scale).square().sum(-1)
        best, least = torch.where(noise < least, scale.squeeze(-1), best), noise.minimum(least)
    return rounded_to(weight, best, torch.zeros_like(best), group_size)


@functools.cache
def _torchao_hqq() -> Callable[..., tuple]:
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    return _choose_qparams_and_quantize_affine_hqq
