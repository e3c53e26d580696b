"""4-bit grids found with the help of what a matrix reads: activation-weighted fits, AWQ and GPTQ.

All of them know the second moments of the matrix's inputs, ``H = E[x x^T]`` (from calibration text; `moments.py`), and
judge an approximation V of W by the error of its outputs, ``E |W x - V x|^2 = tr((W - V) H (W - V)^T)``.

    fit_grid   scale and zero of every group for weights that count by ``diag(H)``: the extremes are clipped by steps,
               then scale and zero are solved for the integers found (weighted least squares), a few times over
    awq        AWQ (Lin et al. 2023, arXiv 2306.00978): input feature k is scaled by ``s_k = (E x_k^2)^(alpha / 2)``
               before the fit, so that weights which meet large inputs are rounded less; alpha rises from 0 for as long
               as that helps. The caller divides the inputs by s
    gptq       GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after another, those with the
               largest inputs first, and each one's error is made up for by the columns that follow

Not handled: errors of earlier layers in the inputs. The moments are the backbone's, since a twin runs after any number
of twins, or none.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from river_compile.kernels.checks import check_choice
from river_compile.kernels.native import packing
from river_compile.kernels.quant.grid import (
    MAX_Q,
    MID_POINT,
    QuantizedWeight,
    check_matrix,
    decibels,
    nearest,
    pieces,
    rounded_to,
    spanning_grid,
    storable_grid,
)
from river_compile.kernels.quant.moments import BLOCK, Compensation, SecondMoments

OBSERVING = ("gptq", "awq")
ALPHAS = (0.0, 0.15, 0.3, 0.45, 0.6)
DAMPING = 0.05  # share of the mean squared input that is added to every column's own
FEW_TOKENS = 0.2  # the same, for each feature that one token stands for
_SHRINKS = tuple(1 - 0.04 * i for i in range(1, 13))  # shares of a group's extent, down to about a half
_REFITS = 2
_ELEMENTS_TOGETHER = 1 << 24  # of a matrix, whose copies GPTQ holds at a time


def quantize_observed(
    weight: Tensor,
    group_size: int,
    quantizer: str,
    moments: SecondMoments,
    dtype: torch.dtype = torch.float32,
    may_scale: bool = True,
    tokens: float = math.inf,
) -> tuple[QuantizedWeight, Tensor | None]:
    """Quantizes a matrix to 4 bits by what it reads.

    Args:
        weight: floating-point ``[N, K]``; must be finite.
        group_size: a divisor of K.
        quantizer: ``"awq"`` or ``"gptq"``.
        moments: of K features, float32: the mean of x x^T over the calibration text.
        dtype: of scale and zero as the kernel stores them; integers are chosen for the rounded ones.
        may_scale: False leaves AWQ's inputs as they are: its grid is then an activation-weighted fit.
        tokens: over how many tokens the moments are a mean. GPTQ blends those of few with the identity.

    Returns:
        The grid, and for AWQ the float32 scale s ``[K]`` that the inputs are to be divided by: the grid stands for
        ``W diag(s)``. None where they stay as they are.

    Raises:
        ValueError: an unknown quantizer, a bad matrix or group size (see `quantize`), or moments of other features or
            that are not finite.
    """
    check_choice("quantizer", quantizer, OBSERVING)
    weight = check_matrix(weight, group_size)
    features = weight.shape[1]
    if moments.features != features or not moments.finite:
        raise ValueError(
            f"the moments of a matrix with {features} input features are finite and of {features} features; these are "
            f"of {moments.features}"
        )
    if quantizer == "gptq":
        return gptq(weight, group_size, moments, dtype, tokens), None
    return awq(weight, group_size, moments, dtype, may_scale)


def output_sqnr_db(weight: Tensor, approximation: Tensor, moments: SecondMoments) -> float:
    """Returns the signal-to-noise ratio of a matrix's outputs in dB: 10 log10(E |W x|^2 / E |W x - V x|^2)."""
    weight = weight.detach().float()
    return decibels(moments.energy(weight), moments.energy(weight - approximation.float()))


def fit_grid(
    weight: Tensor, group_size: int, importance: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Fits scale and zero, float32 ``[N, K / group_size]`` and rounded to `dtype`, by weighted least squares.

    Args:
        weight: float32 ``[N, K]``.
        group_size: a divisor of K.
        importance: ``[K]``, at least 0: how much a squared error counts in each column.
        dtype: of scale and zero as the kernel stores them.
    """
    weights_G = importance.reshape(1, -1, group_size)
    # Groups that no input reaches are fitted as if all columns counted alike.
    weights_G = torch.where(weights_G.sum(-1, keepdim=True) > 0, weights_G, torch.ones_like(weights_G))
    weights_G = weights_G / weights_G.sum(-1, keepdim=True)
    if packing.usable(weight, group_size, dtype):
        return packing.fit_grid(weight, group_size, weights_G.flatten().float(), dtype)
    fitted = [_fit(piece.unflatten(1, (-1, group_size)), weights_G, dtype) for piece in pieces(weight)]
    return torch.cat([scale for scale, _ in fitted]), torch.cat([zero for _, zero in fitted])


def gptq(
    weight: Tensor,
    group_size: int,
    moments: SecondMoments,
    dtype: torch.dtype = torch.float32,
    tokens: float = math.inf,
) -> QuantizedWeight:
    """Rounds a float32 matrix column by column, each error made up for by the columns that are left.

    The grid is fitted once, before any column moves (`fit_grid`), so that the order of columns is free. What few
    tokens seem to have in common may be chance, and errors made up for by it are errors made.
    """
    damping = DAMPING + FEW_TOKENS * moments.features / tokens
    squares = moments.diagonal + moments.added(damping)
    scale, zero = fit_grid(weight, group_size, squares, dtype)
    order = squares.argsort(descending=True)
    compensation = moments.compensation(damping, order)
    q = round_compensating(weight[:, order], scale, zero, order // group_size, compensation)
    return QuantizedWeight(q[:, order.argsort()], scale, zero, group_size)


def awq(
    weight: Tensor, group_size: int, moments: SecondMoments, dtype: torch.dtype = torch.float32, may_scale: bool = True
) -> tuple[QuantizedWeight, Tensor | None]:
    """Scales the input features of a float32 matrix so that its outputs err least; see `quantize_observed`."""
    least = math.inf
    found: tuple[QuantizedWeight, Tensor | None] | None = None
    squares = moments.diagonal
    for alpha in ALPHAS if may_scale else (0.0,):
        scale_K = _input_scale(squares, alpha) if alpha else torch.ones_like(squares)
        grid = round_to_grid(weight * scale_K, group_size, squares / scale_K.square(), dtype)
        noise = moments.energy(weight - grid.dequantize() / scale_K)
        if found is not None and noise >= least:
            break
        least, found = noise, (grid, scale_K if alpha else None)
    assert found is not None
    return found


def round_to_grid(
    weight: Tensor, group_size: int, importance: Tensor, dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Rounds every weight to the nearest point of the grid that `fit_grid` finds."""
    return rounded_to(weight, *fit_grid(weight, group_size, importance, dtype), group_size)


def round_compensating(
    weight: Tensor, scale: Tensor, zero: Tensor, group_of: Tensor, compensation: Compensation
) -> Tensor:
    """Rounds columns in order; what the remaining columns can make up for of an error, they do.

    After columns 0..j the others are moved to where the output error is least: column k by ``-e_j U_jk / U_jj``.

    Args:
        weight: ``[N, K]``, columns in the order of rounding; the result, q uint8 ``[N, K]``, has the same order.
        scale, zero: ``[N, groups]``.
        group_of: ``[K]``, the group of each column.
        compensation: U with ``H^-1 = U^T U``, rows and columns in the same order.
    """
    round_block = packing.round_block if packing.usable(weight) else _round_block
    group_of = group_of.contiguous()
    rows = max(1, _ELEMENTS_TOGETHER // weight.shape[1])
    found = []
    for some in zip(weight.split(rows), scale.split(rows), zero.split(rows), strict=True):
        left_KN, scale_GN, zero_GN = (tensor.T.contiguous() for tensor in some)  # a column is one run of memory
        q_KN = torch.empty_like(left_KN, dtype=torch.uint8)
        carry = compensation.carrier(left_KN)
        for start in range(0, len(left_KN), BLOCK):
            block = slice(start, start + BLOCK)
            errors_KN = torch.empty_like(left_KN[block])
            inside = compensation.inside(block)
            round_block(left_KN[block], scale_GN, zero_GN, group_of[block], inside, errors_KN, q_KN[block])
            carry(block, errors_KN)
        found.append(q_KN.T)
    return torch.cat(found)


def _round_block(
    left_KN: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    group_of: Tensor,
    factor: Tensor,
    errors_KN: Tensor,
    q_KN: Tensor,
) -> None:
    """Rounds a block of columns, and makes up for errors within it.

    Args:
        left_KN: the columns, as those before the block left them; overwritten.
        scale_GN, zero_GN: of every group.
        group_of: ``[K]``, the group of each column.
        factor: the columns' own ``[K, K]`` part of U.
        errors_KN: receives what the columns after the block are to make up for.
        q_KN: receives q.
    """
    for i, group in enumerate(group_of.tolist()):
        q = nearest(left_KN[i], scale_GN[group], zero_GN[group])
        errors_KN[i] = (left_KN[i] - (q * scale_GN[group] + zero_GN[group])) / factor[i, i]
        left_KN[i + 1 :].addr_(factor[i, i + 1 :], errors_KN[i], alpha=-1)
        q_KN[i] = (q + MID_POINT).to(torch.uint8)


def _fit(groups: Tensor, importance: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Fits groups ``[n, K / G, G]`` with importance ``[1, K / G, G]`` that sums to one in each group."""
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
    """Solves for the scale and zero that suit the integers of a grid best, by weighted least squares."""
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


def _input_scale(squares: Tensor, alpha: float) -> Tensor:
    """Returns s_k = (E x_k^2)^(alpha / 2) around 1; inputs that are never anything but zero count as the least one."""
    smallest = squares[squares > 0].min() if (squares > 0).any() else squares.new_ones(())
    scale = squares.clamp(min=smallest).pow(alpha / 2)
    return scale / (scale.max() * scale.min()).sqrt()
