"""4-bit grids that minimize output errors on calibration inputs: activation-weighted fits, AWQ and GPTQ.

An approximation V of a weight W is judged by ``E |W x - V x|^2 = tr((W - V) H (W - V)^T)``, with ``H = E[x x^T]``.
Not handled: errors of earlier layers in the inputs. The moments are those of the unquantized model, since any number of
twins may run before one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from river_compile.kernels.checks import check_choice
from river_compile.kernels.native import load as native
from river_compile.kernels.quant.fit import fit_grid, round_to_grid
from river_compile.kernels.quant.grid import (
    MID_POINT,
    QuantizedWeight,
    check_matrix,
    check_shape,
    decibels,
    nearest,
)

OBSERVING = ("gptq", "awq")
BLOCK = 128  # columns rounded before the errors are applied to later ones
ALPHAS = (0.0, 0.15, 0.3, 0.45, 0.6)
DAMPING = 0.05  # share of the mean squared input that is added to every column's own
FEW_TOKENS = 0.2  # the same, for each feature per token
_ELEMENTS_TOGETHER = 1 << 22  # of a weight, whose copies in float32 GPTQ holds at a time

# Applies the errors ``[block, N]`` of a block of columns to later columns.
Carry = Callable[[slice, Tensor], None]


def quantize_observed(
    weight: Tensor,
    group_size: int,
    quantizer: str,
    moments: SecondMoments,
    dtype: torch.dtype = torch.float32,  # of the stored scale and zero-point, to which the integers are fitted
    may_scale: bool = True,  # False: AWQ without input scales, an activation-weighted fit
    tokens: float = math.inf,  # of the calibration text; GPTQ damps the moments of few
) -> tuple[QuantizedWeight, Tensor | None]:
    """Quantize a weight ``[N, K]`` by its inputs' moments; AWQ also returns s ``[K]``, which divides the inputs."""
    check_choice("quantizer", quantizer, OBSERVING)
    check_shape(weight, group_size)
    features = weight.shape[1]
    if moments.features != features or not moments.finite:
        raise ValueError(
            f"the moments of a weight with {features} input features must be finite and of {features} features; these "
            f"are of {moments.features}"
        )
    # The grid of AWQ stands for W diag(s). s is float32, or None if the inputs stay as they are.
    if quantizer == "gptq":
        return gptq(weight, group_size, moments, dtype, tokens), None
    return awq(check_matrix(weight, group_size), group_size, moments, dtype, may_scale)


def output_sqnr_db(weight: Tensor, approximation: Tensor, moments: SecondMoments) -> float:
    """Return the outputs' signal-to-noise ratio in dB: 10 log10(E |W x|^2 / E |W x - V x|^2)."""
    weight = weight.detach().float()
    return decibels(moments.energy(weight), moments.energy(weight - approximation.float()))


def gptq(
    weight: Tensor,
    group_size: int,
    moments: SecondMoments,
    dtype: torch.dtype = torch.float32,
    tokens: float = math.inf,
) -> QuantizedWeight:
    """GPTQ (Frantar et al. 2022, arXiv 2210.17323) of a weight: columns with the largest inputs first."""
    # Correlations over few tokens may be chance, so few tokens are damped more.
    damping = DAMPING + FEW_TOKENS * moments.features / tokens
    squares = moments.diagonal + moments.added(damping)
    order = squares.argsort(descending=True)
    compensation = moments.compensation(damping, order)
    # Rows are independent; a few at a time are in float32.
    n, k = weight.shape
    q = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
    grids = []
    slabs = max(1, _ELEMENTS_TOGETHER // k)
    for rows, q_rows in zip(weight.split(slabs), q.split(slabs), strict=True):
        grids.append(_gptq_rows(rows, q_rows, group_size, squares, order, compensation, dtype))
    scale, zero = (torch.cat(parts) for parts in zip(*grids, strict=True))
    return QuantizedWeight(q, scale, zero, group_size)


def _gptq_rows(
    rows: Tensor,
    q_NK: Tensor,  # to be filled
    group_size: int,
    squares: Tensor,
    order: Tensor,
    compensation: Compensation,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Round some rows; return their scales and zero-points."""
    rows = check_matrix(rows, group_size)
    scale, zero = fit_grid(rows, group_size, squares, dtype)  # before any column changes, so that any order will do
    left_KN = rows.T.contiguous()[order]  # a column is one run of memory
    q_KN = round_compensating(left_KN, scale.T.contiguous(), zero.T.contiguous(), order // group_size, compensation)
    q_NK.copy_(q_KN[order.argsort()].T)
    return scale, zero


def awq(
    weight: Tensor, group_size: int, moments: SecondMoments, dtype: torch.dtype = torch.float32, may_scale: bool = True
) -> tuple[QuantizedWeight, Tensor | None]:
    """AWQ (Lin et al. 2023, arXiv 2306.00978) of a float32 weight; returns as `quantize_observed`."""
    least = math.inf
    found: tuple[QuantizedWeight, Tensor | None] | None = None
    squares = moments.diagonal
    # Input feature k is scaled by s_k before the fit, so that weights of large inputs are rounded less.
    for alpha in ALPHAS if may_scale else (0.0,):
        scale_K = _input_scale(squares, alpha) if alpha else torch.ones_like(squares)
        grid = round_to_grid(weight * scale_K, group_size, squares / scale_K.square(), dtype)
        noise = moments.energy(weight - grid.dequantize() / scale_K)
        if found is not None and noise >= least:
            break
        least, found = noise, (grid, scale_K if alpha else None)
    assert found is not None
    return found


def round_compensating(
    left_KN: Tensor, scale_GN: Tensor, zero_GN: Tensor, group_of: Tensor, compensation: Compensation
) -> Tensor:
    """Round the columns of a weight in order, which are overwritten, to q ``[K, N]``; `group_of`: their groups."""
    # After columns 0..j the others move to the least output error: column k by -e_j U_jk / U_jj.
    round_block = native.round_block if native.can_pack(left_KN) else _round_block
    group_of = group_of.contiguous()
    q_KN = torch.empty_like(left_KN, dtype=torch.uint8)
    carry = compensation.carrier(left_KN)
    for start in range(0, len(left_KN), BLOCK):
        block = slice(start, start + BLOCK)
        errors_KN = torch.empty_like(left_KN[block])
        inside = compensation.inside(block)
        round_block(left_KN[block], scale_GN, zero_GN, group_of[block], inside, errors_KN, q_KN[block])
        carry(block, errors_KN)
    return q_KN


def _round_block(
    left_KN: Tensor,
    scale_GN: Tensor,
    zero_GN: Tensor,
    group_of: Tensor,
    factor: Tensor,
    errors_KN: Tensor,
    q_KN: Tensor,
) -> None:
    """Round a block of columns; overwrites left_KN, fills q_KN and the errors for later columns, errors_KN."""
    for i, group in enumerate(group_of.tolist()):
        q = nearest(left_KN[i], scale_GN[group], zero_GN[group])
        errors_KN[i] = (left_KN[i] - (q * scale_GN[group] + zero_GN[group])) / factor[i, i]
        left_KN[i + 1 :].addr_(factor[i, i + 1 :], errors_KN[i], alpha=-1)
        q_KN[i] = (q + MID_POINT).to(torch.uint8)


def _input_scale(squares: Tensor, alpha: float) -> Tensor:
    """Return s_k = (E x_k^2)^(alpha / 2), centred on 1; inputs that are always zero count as the least other one."""
    smallest = squares[squares > 0].min() if (squares > 0).any() else squares.new_ones(())
    scale = squares.clamp(min=smallest).pow(alpha / 2)
    return scale / (scale.max() * scale.min()).sqrt()


class Compensation(ABC):
    """U, upper triangular with ``(H + d I)^-1 = U^T U``, in blocks of `BLOCK` columns from the first to the last."""

    @abstractmethod
    def inside(self, block: slice) -> Tensor:
        """Return the block's own part of U, with contiguous rows."""

    @abstractmethod
    def carrier(self, left_KN: Tensor) -> Carry:
        """Return a function to call after each block in order, which updates later columns before their own block."""


class SecondMoments(ABC):
    """H, over K `features`."""

    features: int

    @property
    @abstractmethod
    def diagonal(self) -> Tensor:
        """The mean square of each feature ``[K]``."""

    @property
    @abstractmethod
    def finite(self) -> bool: ...

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return H ``[K, K]``."""

    @abstractmethod
    def energy(self, matrix: Tensor) -> float:
        """Return tr(M H M^T), the mean squared length of M x, for M ``[N, K]``."""

    @abstractmethod
    def compensation(self, damping: float, order: Tensor) -> Compensation:
        """Return U of H damped by a share of the mean square, with columns in this order."""

    def added(self, damping: float) -> float:
        """Return the damping that is added to H's diagonal; 1 if all inputs were zero."""
        mean = self.diagonal.mean().item()
        return damping * mean if mean > 0 else 1.0


class WholeMoments(SecondMoments):
    """H as a matrix ``[K, K]``."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self.features = matrix, len(matrix)

    @property
    def diagonal(self) -> Tensor:
        return self._matrix.diagonal()

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self._matrix).all())

    def matrix(self) -> Tensor:
        return self._matrix

    def energy(self, matrix: Tensor) -> float:
        return torch.sum((matrix @ self._matrix) * matrix, dtype=torch.float64).item()

    def compensation(self, damping: float, order: Tensor) -> Compensation:
        ordered = self._matrix[order][:, order]
        ordered.diagonal().add_(self.added(damping))
        return WholeCompensation(inverse_factor(ordered))


class RowMoments(SecondMoments):
    """H as the T inputs ``[T, K]`` that it is a mean over: far fewer operations if T is far below K."""

    def __init__(self, inputs: Tensor) -> None:
        self._inputs, self.features = inputs, inputs.shape[1]

    @property
    def diagonal(self) -> Tensor:
        return self._inputs.square().mean(0)

    @property
    def finite(self) -> bool:
        return bool(torch.isfinite(self._inputs).all())

    def matrix(self) -> Tensor:
        return self._inputs.T @ self._inputs / len(self._inputs)

    def energy(self, matrix: Tensor) -> float:
        outputs = matrix @ self._inputs.T
        return torch.sum(outputs.square(), dtype=torch.float64).item() / len(self._inputs)

    def compensation(self, damping: float, order: Tensor) -> Compensation:
        return RowCompensation(self._inputs[:, order].T.contiguous() / len(self._inputs) ** 0.5, self.added(damping))


class WholeCompensation(Compensation):
    """U as a matrix ``[K, K]``."""

    def __init__(self, factor: Tensor) -> None:
        self._factor = factor.contiguous()

    def inside(self, block: slice) -> Tensor:
        return self._factor[block, block]

    def carrier(self, left_KN: Tensor) -> Carry:
        def carry(block: slice, errors_KN: Tensor) -> None:
            left_KN[block.stop :].addmm_(self._factor[block, block.stop :].T, errors_KN, alpha=-1)

        return carry


class RowCompensation(Compensation):
    """U of ``d I + A A^T`` for A = inputs_KT and d = added, above 0."""

    def __init__(self, inputs_KT: Tensor, added: float) -> None:
        # A_B are the rows of a block, A_F those of later columns, and M = (d I + A_F^T A_F)^-1 has T x T elements. By
        # the push-through identity the inverse over B and F has (d S)^-1 over B, where S = I + A_B M A_B^T. U_BB is the
        # inverse factor of d S, and U_BF = C A_F^T with C = -U_BB A_B M. By Woodbury's identity M of the block before
        # is M - d C^T C. Errors e reach later columns through T numbers per output feature, the sums
        # of C^T e.
        features, tokens = inputs_KT.shape
        self._inputs_KT, self._through_KT = inputs_KT, torch.empty_like(inputs_KT)
        self._inside: dict[int, Tensor] = {}
        inverse_TT = torch.eye(tokens, dtype=inputs_KT.dtype, device=inputs_KT.device) / added
        for start in reversed(range(0, features, BLOCK)):
            own = inputs_KT[start : start + BLOCK]
            met = own @ inverse_TT
            left = added * (met @ own.T)
            left.diagonal().add_(added)
            self._inside[start] = inner = inverse_factor(left).contiguous()
            through = torch.mm(inner, met, out=self._through_KT[start : start + BLOCK]).neg_()
            inverse_TT.addmm_(through.T, through, alpha=-added)

    def inside(self, block: slice) -> Tensor:
        return self._inside[block.start]

    def carrier(self, left_KN: Tensor) -> Carry:
        sums_TN = left_KN.new_zeros(self._inputs_KT.shape[1], left_KN.shape[1])

        def carry(block: slice, errors_KN: Tensor) -> None:
            following = slice(block.stop, block.stop + BLOCK)
            sums_TN.addmm_(self._through_KT[block].T, errors_KN)
            left_KN[following].addmm_(self._inputs_KT[following], sums_TN, alpha=-1)

        return carry


def inverse_factor(moments: Tensor) -> Tensor:
    """Return the upper triangular U with ``H^-1 = U^T U``."""
    # H = R R^T with R upper triangular is the Cholesky factor of H read backwards; U is R's inverse.
    return _upper_inverse(torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1))


def _upper_inverse(upper: Tensor) -> Tensor:
    """Invert an upper triangular matrix by halves: a solver takes three times the operations."""
    size = len(upper)
    if size <= BLOCK:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, eye, upper=True)
    half = size // 2
    inverse = torch.zeros_like(upper)
    inverse[:half, :half] = first = _upper_inverse(upper[:half, :half])
    inverse[half:, half:] = last = _upper_inverse(upper[half:, half:])
    inverse[:half, half:] = -(first @ upper[:half, half:] @ last)
    return inverse
