"""The inputs of a model's matrices as second moments: the statistics that "awq" and "gptq" quantize with.

They are observed at the matmuls themselves: ``F.linear``, ``addmm``, ``matmul``, ``bmm``, the forms that twins replace.
Matrices are recognised by their address: parameters of two dimensions and the matrices of three-dimensional stacks
(experts), also transposed. Inputs are kept as they are while they take less room than their moments, ``4 K^2`` bytes
for K features, and are summed up then: some 2 K tokens in 16 bits. Of a quarter as many tokens as features, quantizers
are given the inputs themselves.

Not handled: other ways to read a stack than one of its matrices, or all of them, at a time; other threads than the one
that entered; which texts are observed (:mod:`river_compile.twins.observe`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from river_compile.kernels.quant.calibrated import RowMoments, SecondMoments, WholeMoments
from river_compile.upstream.tensors import local_of

_FEWER = 4  # times as many features as tokens, whatever the matrix's rows; nearer to each other, it depends on those


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

    def cheapest(self, device: torch.device | None = None) -> SecondMoments:
        """Returns the moments in the form that takes a quantizer the fewest operations, on a device if one is given."""
        if self._sum is None and _FEWER * self.tokens <= self.features:
            return RowMoments(torch.cat(self._rows).to(device, torch.float32))
        return WholeMoments(self.matrix().to(device))

    def _summed(self) -> Tensor:
        if not self._rows:
            assert self._sum is not None, "no input was added"
            return self._sum
        rows = torch.cat(self._rows).float()
        return rows.T @ rows if self._sum is None else self._sum.addmm(rows.T, rows)


class ExpertMoments:
    """Second moments of the inputs of each of E stacked matrices with K `features`."""

    def __init__(self, experts: int, features: int) -> None:
        self._each = [InputMoments(features) for _ in range(experts)]

    @property
    def nbytes(self) -> int:
        return sum(moments.nbytes for moments in self._each)

    def add(self, expert: int, x: Tensor) -> None:
        """Adds inputs ``[..., K]`` of one of them."""
        self._each[expert].add(x)

    def of(self, expert: int, device: torch.device | None = None) -> tuple[SecondMoments, int]:
        """Returns an expert's moments, as `InputMoments.cheapest`, and tokens; without tokens those of all experts."""
        own = self._each[expert]
        return (own.cheapest(device), own.tokens) if own.tokens else (WholeMoments(self._together.to(device)), 0)

    @functools.cached_property
    def _together(self) -> Tensor:
        reached = [moments for moments in self._each if moments.tokens]
        total = sum(moments.tokens for moments in reached)
        return torch.stack([moments.matrix() * (moments.tokens / total) for moments in reached]).sum(0)


Moments = InputMoments | ExpertMoments


class Observation:
    """Calibration statistics of a model: the second moments of its matrices' inputs; see :func:`observe`.

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
        """A description of the observed text."""
        return f"{self.tokens} tokens that the model sampled" if self.own else f"{self.tokens} observed tokens"

    def moments_of(self, weight: Tensor) -> Moments | None:
        """Returns the moments of a parameter's inputs, of each expert's for a stack; None if no text reached it."""
        return self.moments.get(weight)

    def clear(self) -> None:
        """Frees its memory; twins that are packed stay, and others are made from text of the model's own."""
        self.moments.clear()

    def __str__(self) -> str:
        return f"observed {len(self.moments)} matrices on {self.tokens} tokens ({self.nbytes / 1e6:.0f} MB)"


_PRODUCTS = (nn.functional.linear, torch.addmm, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Products(TorchFunctionMode):
    """Calls `meets` for each product with one of the parameters, and computes with what `instead` returns.

    Args:
        parameters: of a model; under tensor parallelism the rank's own parts are the matrices.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._matrices: dict[int, tuple[Tensor, int]] = {}  # by address: the parameter, and which one of its stack
        self._stacks: dict[int, Tensor] = {}
        for parameter in map(local_of, parameters):
            if parameter.dim() == 2:
                self._matrices[parameter.data_ptr()] = parameter, 0
            elif parameter.dim() == 3:
                self._stacks[parameter.data_ptr()] = parameter
                self._matrices |= {matrix.data_ptr(): (parameter, i) for i, matrix in enumerate(parameter.detach())}

    def meets(self, x: Tensor, parameter: Tensor, index: int) -> None:
        """Sees inputs ``[..., K]`` of a matrix; of a stack, of the one with this index."""

    def instead(self, matrix: Tensor, parameter: Tensor, index: int | None) -> Tensor:
        """Returns the operand in a matrix's place; index None: a whole stack."""
        return matrix

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        before = after = None
        if func in _PRODUCTS:
            known = [self._matrices.get(t.data_ptr()) if t.dim() == 2 else None for t in tensors]
            at = next((i for i, found in enumerate(known) if found is not None), 0)
            found = known[at] if at > 0 else None  # (the first argument is an input or a bias)
            if found is not None:
                self.meets(tensors[at - 1], *found)
                before, after = tensors[at], self.instead(tensors[at], *found)
        elif func is torch.bmm and (stack := self._stacks.get(tensors[1].data_ptr())) is not None:
            for expert, x in enumerate(tensors[0]):  # (rows that it was not chosen for are zero)
                self.meets(x[(x != 0).any(-1)], stack, expert)
            before, after = tensors[1], self.instead(tensors[1], stack, None)
        if after is before:
            return func(*args, **kwargs)
        swapped = {name: after if value is before else value for name, value in kwargs.items()}
        return func(*(after if value is before else value for value in args), **swapped)
