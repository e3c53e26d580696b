"""Tensors as torch does not describe them: parts of quantized ones, changes, a rank's share.

Not handled: fake tensors.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from river_compile.passes.nodes import is_ordinary


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that hold a tensor's data: itself, or the parts of a quantized one."""
    if is_ordinary(tensor):
        return [tensor]
    subclass: Any = tensor
    names, _ = subclass.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def as_ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor's values in its dtype, dequantized if it is quantized."""
    return tensor.detach() if is_ordinary(tensor) else tensor.dequantize().to(tensor.dtype)


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes that PyTorch counted; it counts none of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def local_of(tensor: Any) -> Any:
    """Return this rank's part of a DTensor, always the same tensor; other values unchanged."""
    return getattr(tensor, "_local_tensor", tensor)
