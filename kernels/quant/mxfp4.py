"""MXFP4 stacks of experts, as gpt-oss's checkpoints hold them: 4-bit floats with a power of two for every 32.

The bytes are the checkpoint's, and `Mxfp4Stack` makes them a parameter. Not handled: MXFP4 of plain linear layers,
GPUs, gradients, and finding groups with subnormal bfloat16 numbers in a stack of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.native import load as native

LAYOUT_MXFP4 = "mxfp4"
GROUP = 32  # input features that share a scale
_BYTES = GROUP // 2
_NOT_A_NUMBER = 255  # the scale that stands for NaN
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1; codes from 8 on are negative

# For N output and K input features: blocks uint8 [N, K / 32, 16], byte j of a group its features 2 j in the low and
# 2 j + 1 in the high nibble; scales uint8 [N, K / 32], each 2^(scale - 127). Every value fits into bfloat16. Of a group
# in 16 bits one scale is tried, with which its largest number is 4 to 6: all numbers of larger scales have it.


def unpack_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Return the bfloat16 values ``[..., N, K]`` of blocks uint8 ``[..., N, K / 32, 16]`` and their scales."""
    # (Traceable: no tensor is kept from one call to the next.)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    numbers = torch.tensor([*_MAGNITUDES, *(-m for m in _MAGNITUDES)], device=blocks.device)[codes.int()]
    bits = scales.to(torch.int32)
    is_other = (bits == 0) | (bits == _NOT_A_NUMBER)  # 2^-127, which is subnormal, and NaN
    powers = (bits << 23 | is_other.to(torch.int32) << 22).view(torch.float32)
    return (numbers * powers.unsqueeze(-1)).bfloat16().flatten(-2)


def find_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return blocks and scales of a bfloat16 matrix ``[N, K]`` with exactly its values; None if it has none."""
    n, k = weight.shape
    if weight.dtype != torch.bfloat16 or k % GROUP:
        return None
    blocks = torch.empty((n, k // GROUP, _BYTES), dtype=torch.uint8)
    scales = torch.empty(blocks.shape[:-1], dtype=torch.uint8)
    return (blocks, scales) if native.find_mxfp4(weight.detach().contiguous(), blocks, scales) else None


def check_mxfp4(name: str, blocks: Tensor, scales: Tensor) -> None:
    """Raise a ValueError that names what is wrong with a stack's blocks or scales."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"{name} has blocks in {blocks.dtype} and scales in {scales.dtype}, and MXFP4 has uint8")
    if blocks.dim() != 4 or blocks.shape[-1] != _BYTES or scales.shape != blocks.shape[:-1]:
        shapes = f"blocks {tuple(blocks.shape)} and scales {tuple(scales.shape)}"
        raise ValueError(f"{name} has {shapes}, and MXFP4 has [E, N, K / 32, 16] and [E, N, K / 32]")
    wrong = (scales == _NOT_A_NUMBER).nonzero()
    if len(wrong):
        expert, row, group = wrong[0].tolist()
        raise ValueError(f"{name} has the scale 255, NaN, in group {group} of row {row} of expert {expert}")


class Mxfp4Stack(Tensor):
    """A stack ``[E, K, N]`` of bfloat16 values that lie in memory as MXFP4; `blocks` and `scales` have all of them.

    The C++ kernels read the bytes. Every other operation reads a copy in 16 bits, of chosen experts if it chooses
    first. Raises a ValueError for bytes that are no MXFP4.
    """

    blocks: Tensor  # uint8 [E, N, K / 32, 16]
    scales: Tensor  # uint8 [E, N, K / 32]

    @staticmethod
    def __new__(cls, blocks: Tensor, _scales: Tensor) -> Mxfp4Stack:
        experts, n, groups, _ = blocks.shape
        sizes = (experts, GROUP * groups, n)
        made: Mxfp4Stack = Tensor._make_wrapper_subclass(cls, sizes, dtype=torch.bfloat16, device=blocks.device)
        return made

    def __init__(self, blocks: Tensor, scales: Tensor) -> None:
        self.blocks, self.scales = blocks, scales

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]  # torch has no types for it
        return f"Mxfp4Stack({tuple(self.shape)})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["blocks", "scales"], None

    @staticmethod
    def __tensor_unflatten__(parts: Mapping[str, Tensor], _: None, _size: object, _stride: object) -> Mxfp4Stack:
        return Mxfp4Stack(parts["blocks"], parts["scales"])

    def storage(self) -> Any:  # (safetensors asks for it)
        raise RuntimeError(
            "MXFP4 experts have no storage in 16 bits, and save_pretrained requires one. Copy the checkpoint's folder"
        )

    def dequantize(self) -> Tensor:
        """Return the bfloat16 values ``[E, K, N]``."""
        if self.blocks.is_meta:  # a table of numbers is no fake tensor there
            return self.blocks.new_empty(self.shape, dtype=self.dtype)
        return unpack_mxfp4(self.blocks, self.scales).mT.contiguous()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared as if it had no `func`
        cls, func: Any, _types: Iterable[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        aten = torch.ops.aten
        if func in _SAME_VALUES and not kwargs.get("dtype"):
            return args[0]._each(lambda part: func(part, *args[1:], **kwargs))
        if func is aten.index.Tensor and len(args[1]) == 1:  # experts, whose values alone are needed
            return args[0]._each(lambda part: func(part, args[1])).dequantize()
        plain = [a.dequantize() if isinstance(a, Mxfp4Stack) else a for a in args]
        named = {key: a.dequantize() if isinstance(a, Mxfp4Stack) else a for key, a in kwargs.items()}
        return func(*plain, **named)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Mxfp4Stack:
        return Mxfp4Stack(change(self.blocks), change(self.scales))


_SAME_VALUES = (
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
)


def mxfp4_parts(tensor: object) -> tuple[Tensor, Tensor] | None:
    """Return blocks and scales of a `Mxfp4Stack`, real or fake, not copied; None for other values."""
    return (tensor.blocks, tensor.scales) if isinstance(tensor, Mxfp4Stack) else None
