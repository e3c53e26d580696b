"""Second moments of what a matrix reads, ``H = E[x x^T]``, and what GPTQ asks of them.

    WholeMoments   H as it is, ``[K, K]``
    RowMoments     the T inputs that H is a mean over, ``[T, K]``: for a T far below K the same results with a part of
                   the operations, and nothing of K x K elements is made

GPTQ rounds columns block after block. What later columns make up for is said by U, upper triangular, with
``(H + d I)^-1 = U^T U``: the inverse of R in ``H + d I = R R^T``. Without the columns that were rounded, U's other rows
are still those of the inverse over the columns that are left.

By inputs ``A = X^T / sqrt(T)``, of which a block has the rows A_B and later columns the rows A_F, with
``M = (d I + A_F^T A_F)^-1`` of T x T elements (the push-through identity, and Woodbury's for M of the block before):

    the inverse over B and F    has the part (d S)^-1 over B, where S = I + A_B M A_B^T
    U_BB                        the inverse of the factor of d S
    U_BF = C A_F^T              where C = -U_BB A_B M
    M of the block before       M - d C^T C

Errors of a block come to later columns through T numbers for each output feature, ``C^T e``, of which sums are kept.

Not handled: which order of columns is a good one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128  # columns that are rounded before others hear of their errors

# Moves what the errors ``[block, N]`` of a block of columns ask of the columns after it.
Carry = Callable[[slice, Tensor], None]


class Compensation(ABC):
    """U, as rounding asks for it: in blocks of `BLOCK` columns, from the first to the last."""

    @abstractmethod
    def inside(self, block: slice) -> Tensor:
        """Returns the block's own part of U, upper triangular, whose rows lie in one piece each."""

    @abstractmethod
    def carrier(self, left_KN: Tensor) -> Carry:
        """Returns what is called after each block in order, and moves later columns in time for their own block."""


class SecondMoments(ABC):
    """H, over K `features`."""

    features: int

    @property
    @abstractmethod
    def diagonal(self) -> Tensor:
        """The mean square of each feature ``[K]``."""

    @property
    @abstractmethod
    def finite(self) -> bool:
        """Whether no element is infinite or NaN."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Returns H ``[K, K]``."""

    @abstractmethod
    def energy(self, matrix: Tensor) -> float:
        """Returns tr(M H M^T): the mean squared length of M x, for M ``[N, K]``."""

    @abstractmethod
    def compensation(self, damping: float, order: Tensor) -> Compensation:
        """Returns U of H plus a share of the mean square for each feature, columns in this order."""

    def added(self, damping: float) -> float:
        """Returns what damping adds to each feature's own; 1 where no input was ever non-zero."""
        mean = self.diagonal.mean().item()
        return damping * mean if mean > 0 else 1.0


class WholeMoments(SecondMoments):
    """H as a matrix.

    Args:
        matrix: ``[K, K]``.
    """

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
    """The inputs that H is a mean over.

    Args:
        inputs: ``[T, K]``.
    """

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
    """U of ``d I + A A^T``.

    Args:
        inputs_KT: A.
        added: d, above 0.
    """

    def __init__(self, inputs_KT: Tensor, added: float) -> None:
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
    """Returns the upper triangular U with ``H^-1 = U^T U``."""
    # H = R R^T with R upper triangular is the Cholesky factor of H read backwards; U is R's inverse.
    return _upper_inverse(torch.linalg.cholesky(moments.flip(0, 1)).flip(0, 1))


def _upper_inverse(upper: Tensor) -> Tensor:
    """Returns the inverse of an upper triangular matrix by halves: a solver takes three times the operations."""
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
