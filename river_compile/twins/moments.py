"""What the matrices of a model read, as second moments: the statistics that "awq" and "gptq" quantize with.

Inputs are kept as they are while they take less room than their moments, ``4 K^2`` bytes for K features, and are summed
up then: some 2 K tokens in 16 bits. Not handled: who adds them (:mod:`river_compile.twins.observe`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class InputMoments:
    """Second moments of the inputs of a matrix, ``E[x x^T]``, for K `features`."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.tokens = 0
        self._rows: list[Tensor] = []
        self._sum: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in self._rows) + (0 if self._sum is None else self._sum.nbytes)

    def add(self, x: Tensor) -> None:
        """Adds inputs ``[..., K]``."""
        rows = x.detach().reshape(-1, self.features).clone()
        self._rows.append(rows)
        self.tokens += len(rows)
        if self._sum is not None or self.nbytes > 4 * self.features**2:
            self._sum = self._summed()
            self._rows = []

    def matrix(self) -> Tensor:
        """Returns the moments, float32 ``[K, K]``."""
        return self._summed() / self.tokens

    def _summed(self) -> Tensor:
        if not self._rows:
            assert self._sum is not None, "no input was added"
            return self._sum
        rows = torch.cat(self._rows).float()
        return rows.T @ rows if self._sum is None else self._sum.addmm(rows.T, rows)


class ExpertMoments:
    """Second moments of what each of E stacked matrices with K `features` reads."""

    def __init__(self, experts: int, features: int) -> None:
        self._each = [InputMoments(features) for _ in range(experts)]

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in self._each)

    def add(self, expert: int, x: Tensor) -> None:
        """Adds inputs ``[..., K]`` of one of them."""
        self._each[expert].add(x)

    def of(self, expert: int) -> tuple[Tensor, int]:
        """Returns an expert's moments and tokens; one that no token reached has the moments of all."""
        own = self._each[expert]
        return (own.matrix(), own.tokens) if own.tokens else (self._together, 0)

    @functools.cached_property
    def _together(self) -> Tensor:
        reached = [moments for moments in self._each if moments.tokens]
        total = sum(moments.tokens for moments in reached)
        return torch.stack([moments.matrix() * (moments.tokens / total) for moments in reached]).sum(0)


class Observation:
    """Calibration statistics of a model: the second moments of what its matrices read; see :func:`observe`.

    Attributes:
        own: whether the model sampled the text itself.
        number: distinguishes observations, for what was made with them; 0 for those of own text.
        tokens: how many were seen.
    """

    _made = 0

    def __init__(self, own: bool = False) -> None:
        Observation._made += not own
        self.own = own
        self.number = 0 if own else Observation._made
        self.tokens = 0
        self.moments: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in set(self.moments.values()))

    @property
    def source(self) -> str:
        """What was observed, in words."""
        return f"{self.tokens} tokens that the model sampled" if self.own else f"{self.tokens} observed tokens"

    def moments_of(self, weight: Tensor) -> InputMoments | ExpertMoments | None:
        """Returns the moments of a parameter's inputs, of each expert's for a stack; None where no text reached it."""
        return self.moments.get(weight)

    def clear(self) -> None:
        """Frees its memory; twins that are packed stay, and others are made from text of the model's own."""
        self.moments.clear()

    def __str__(self) -> str:
        return f"observed {len(self.moments)} matrices on {self.tokens} tokens ({self.nbytes / 1e6:.0f} MB)"
