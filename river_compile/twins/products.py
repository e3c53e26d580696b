"""The products of inputs with a model's matrices, seen where they happen: ``F.linear``, ``addmm``, ``matmul``, ``bmm``.

These are the forms that twins replace. Matrices are recognised by their address: parameters of two dimensions and the
matrices of three-dimensional stacks (experts), also transposed. Not handled: other ways to read a stack than one of its
matrices, or all of them, at a time; other threads than the one that entered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from river_compile.upstream.tensors import local_of

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
        """Returns what to multiply by in a matrix's place; index None: by a whole stack."""
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
