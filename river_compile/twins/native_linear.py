"""``F.linear`` of 16-bit tensors by the C++ kernels, while a model runs as it is.

Without AVX-512 torch's own takes ten times as long. Not handled: gradients, and products in other forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from river_compile.kernels.native.load import loaded


class NativeLinear(TorchFunctionMode):
    """Computes matmuls of plain 16-bit tensors with the C++ kernels, if those are loaded."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is nn.functional.linear and loaded():
            x, weight, bias = _operands(*args, **kwargs)
            if _fits(x) and all(_fits(t) and t.dtype == x.dtype for t in (weight, bias) if t is not None):
                return torch.ops.river_native.dense(x, [weight], [] if bias is None else [bias])
        return func(*args, **kwargs)


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    return input, weight, bias


def _fits(x: Tensor) -> bool:
    plain = type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.is_contiguous()
    return plain and x.dtype in (torch.bfloat16, torch.float16) and not (torch.is_grad_enabled() and x.requires_grad)
