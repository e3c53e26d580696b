"""The plain tensors inside a tensor, and whether it has changed.

A parameter under tensor parallelism is a DTensor, which holds the rank's own part of it.

Not handled: tensors without data (fake ones).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from river_compile.passes.nodes import is_ordinary


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Returns the ordinary tensors that hold a tensor's data: itself, or the parts of a quantized one."""
    if is_ordinary(tensor):
        return [tensor]
    subclass: Any = tensor
    names, _ = subclass.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def as_ordinary(tensor: Tensor) -> Tensor:
    """Returns a tensor's values in its dtype, those of a quantized one read back."""
    return tensor.detach() if is_ordinary(tensor) else tensor.dequantize().to(tensor.dtype)


def version_of(tensor: Tensor) -> int:
    """Returns a number that grows with every change in place that PyTorch counts.

    It counts none of inference tensors, such as the weights of a model made under ``torch.inference_mode()``.
    """
    return 0 if tensor.is_inference() else tensor._version


def local_of(tensor: Any) -> Any:
    """Returns this rank's part of a parameter that is spread over several, one tensor for good; others as they are."""
    return getattr(tensor, "_local_tensor", tensor)
