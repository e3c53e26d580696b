"""Group-wise 4-bit quantization of weight matrices: round-to-nearest and HQQ, with their signal-to-noise ratio.

Quantizers that look at a matrix's inputs too are in :mod:`river_compile.kernels.quant.calibrated`.

Every quantizer maps a weight ``[N, K]`` (rows are output features) to a :class:`QuantizedWeight`, whose grid is

    w[n, k] = (q[n, k] - 8) * scale[n, k // group_size] + zero[n, k // group_size]

with ``q`` in 0..15 and a floating-point ``zero`` (the value of the grid's middle point). How the integers are packed
into bytes for a kernel is no concern of this module: see :mod:`river_compile.kernels.quant.layouts`.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from river_compile.kernels.checks import check_choice

MID_POINT = 8
MAX_Q = 15
QUANTIZERS = ("hqq", "rtn")
GROUP_SIZES = (32, 64, 128, 256)
_SOLVER_ELEMENTS = 32_000


@dataclass(frozen=True)
class QuantizedWeight:
    """A 4-bit matrix before packing.

    Attributes:
        q: uint8 ``[N, K]``, values 0..15.
        scale: float32 ``[N, K // group_size]``.
        zero: float32 ``[N, K // group_size]``, the weight that ``q == 8`` stands for.
        group_size: number of consecutive input features that share a scale and a zero.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.q.shape[0], self.q.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns the matrix ``[N, K]`` that the 4-bit weights stand for, computed in `dtype`."""
        n, k = self.shape
        groups = self.q.to(dtype).reshape(n, k // self.group_size, self.group_size)
        w = (groups - MID_POINT) * self.scale.to(dtype)[..., None] + self.zero.to(dtype)[..., None]
        return w.reshape(n, k)

    def to(self, device: torch.device) -> QuantizedWeight:
        """Returns the same grid on a device."""
        return QuantizedWeight(self.q.to(device), self.scale.to(device), self.zero.to(device), self.group_size)

    def rounded(self, dtype: torch.dtype) -> QuantizedWeight:
        """Returns the same grid with scale and zero rounded to `dtype`, as a kernel with such parameters sees it."""
        return QuantizedWeight(self.q, self.scale.to(dtype).float(), self.zero.to(dtype).float(), self.group_size)


def fitting_group_size(in_features: int, requested: int) -> int:
    """Returns the largest power of two that divides `in_features` and is at most `requested`."""
    return math.gcd(in_features, 1 << (requested.bit_length() - 1))


def quantize(weight: torch.Tensor, group_size: int, quantizer: str = "hqq") -> QuantizedWeight:
    """Quantizes a matrix to 4 bits.

    Args:
        weight: floating-point ``[N, K]``; must be finite.
        group_size: a divisor of K.
        quantizer: ``"hqq"`` (half-quadratic quantization, Badri and Shaji 2023, solved by torchao) or ``"rtn"``
            (round to nearest between the group's extremes).

    Raises:
        ValueError: an unknown quantizer, a group size that does not divide K, or weights that are not finite.
    """
    check_choice("quantizer", quantizer, QUANTIZERS)
    weight = check_matrix(weight, group_size)
    return (_hqq if quantizer == "hqq" else _rtn)(weight, group_size)


def check_matrix(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Returns a matrix in float32.

    Raises:
        ValueError: it is no finite matrix, or the group size does not divide its columns.
    """
    if weight.dim() != 2:
        raise ValueError(f"a weight matrix has 2 dimensions, this one has shape {tuple(weight.shape)}")
    if group_size < 1 or weight.shape[1] % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {weight.shape[1]} input features")
    weight = weight.detach().float()
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds infinite or NaN values and cannot be quantized")
    return weight


def sqnr_db(weight: torch.Tensor, approximation: torch.Tensor) -> float:
    """Returns the signal-to-quantization-noise ratio in decibels: 10 log10(sum w^2 / sum (w - approximation)^2)."""
    weight, approximation = weight.detach().double(), approximation.detach().double()
    noise = (weight - approximation).square().sum().item()
    signal = weight.square().sum().item()
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _rtn(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    n, k = weight.shape
    groups = weight.reshape(n, k // group_size, group_size)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / MAX_Q
    # A constant group has no extent: its grid is one point, the zero, which q == 8 hits exactly.
    constant = scale < torch.finfo(torch.float32).tiny
    scale = torch.where(constant, torch.ones_like(scale), scale)
    q = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, MAX_Q)
    q = torch.where(constant[..., None], torch.full_like(q, MID_POINT), q)
    zero = torch.where(constant, low, low + MID_POINT * scale)
    return QuantizedWeight(q.to(torch.uint8).reshape(n, k), scale, zero, group_size)


def _hqq(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    start = _rtn(weight, group_size)
    q, scale, zero = _solve_hqq(weight, group_size)
    # HQQ divides by the group's extent and caps the quotient: groups (nearly) constant keep the exact grid instead.
    extent = weight.unflatten(1, (-1, group_size)).amax(-1) - weight.unflatten(1, (-1, group_size)).amin(-1)
    usable = (extent > MAX_Q / 2e4) & torch.isfinite(scale) & torch.isfinite(zero)
    q = torch.where(usable.repeat_interleave(group_size, dim=1), q, start.q)
    return QuantizedWeight(
        q, torch.where(usable, scale, start.scale), torch.where(usable, zero, start.zero), group_size
    )


def _solve_hqq(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs torchao's HQQ solver; the only place that touches its private function (a contract test pins it).

    Returns q uint8 ``[N, K]`` and scale, zero float32 ``[N, K // group_size]`` of this module's grid.
    """
    solve = _torchao_hqq()
    n, k = weight.shape
    # The solver sweeps over its input some 20 times: in pieces that fit a core's cache that is several times faster,
    # and pieces below the size at which ATen starts threads leave the cores to whoever quantizes other matrices.
    rows = max(1, _SOLVER_ELEMENTS // k) if weight.device.type == "cpu" else n
    parts = [
        solve(piece, nbits=4, group_size=group_size, axis=1, compute_dtype=torch.float32, device=weight.device.type)
        for piece in weight.split(rows)
    ]
    q, scale, zero = (torch.cat([part[i].reshape(-1) for part in parts]) for i in range(3))
    shape = (n, k // group_size)
    return q.reshape(n, k), scale.reshape(shape), zero.reshape(shape)


@functools.cache
def _torchao_hqq() -> Callable[..., tuple]:
    """Imports torchao's solver; torchao warns of every CUDA extension that it cannot load, which says nothing here."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    return _choose_qparams_and_quantize_affine_hqq
