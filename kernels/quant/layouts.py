"""4-bit weights as the bytes that a kernel reads: named layouts, each with pack and unpack.

A new layout is an entry of `LAYOUTS`; its bytes are the same on every machine, so that files may hold them.
Not handled: one scale for several rows, groups across rows, and numbers of bits other than 4 (`quant.lossless`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from river_compile.kernels.checks import check_choice
from river_compile.kernels.native import load as native
from river_compile.kernels.quant import lossless
from river_compile.kernels.quant.grid import GROUP_SIZES, QuantizedWeight
from river_compile.kernels.quant.mxfp4 import GROUP, LAYOUT_MXFP4, find_mxfp4, mxfp4_parts, unpack_mxfp4

PLAIN_LAYOUT = "plain"  # for plain torch
TRITON_LAYOUT = "triton"  # for the generated kernels
NATIVE_LAYOUT = "native"  # for the C++ kernels
LOSSLESS = (*lossless.LAYOUTS_12BIT, lossless.LAYOUT_8BIT, LAYOUT_MXFP4)  # layouts that keep the weights' values
_TRITON_FEATURES = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's nibbles in the layout "triton", from the lowest on

# Layouts, for N output features and K input features padded to whole groups of G. scale_zero[..., 0] is the scale,
# [..., 1] the zero-point (the weight at q = 8). A stack of experts has one more dimension in front.
#
#   triton  qweight int32 [N, K / 8]: word i of a row holds the features 8 i to 8 i + 7, the even ones in its lower half
#           and the odd ones in its upper half. Feature 8 i + 2 p + h has the bits 16 h + 4 p to 16 h + 4 p + 3.
#           scale_zero float16 or bfloat16 [N, K / G, 2].
#   plain   qweight uint8 [N, K / 2]: feature 2 c in the low, 2 c + 1 in the high nibble of byte c.
#           scale_zero float32 [N, K / G, 2].
#   native  for the C++ kernels, which round activations to 8 bits. N' = N rounded up to a multiple of 16.
#           qweight uint8 [N' / 16, K / G, G / 8, 64]. Byte 4 n + j of a line of 64 holds, for output feature n of its
#           16, the line's input feature j in the low and 4 + j in the high nibble. scale_zero bfloat16 [N' / 16, K / G,
#           16, 2].
#   12bit   and the others of `LOSSLESS` have no grid: qweight and scale_zero are units and side, or qweight and scale,
#           of `quant.lossless`, or blocks and scales of `quant.mxfp4`. For a weight that does not fit there, qweight is
#           the weight and scale_zero is empty.


@dataclass(frozen=True)
class PackedLinear:
    """A packed weight, or a stack of such; the comment above has the shapes of each layout."""

    layout: str
    qweight: Tensor
    scale_zero: Tensor
    group_size: int
    in_features: int  # K, without padding
    out_features: int  # N, of each weight of a stack
    experts: int = 0  # E, the weights of a stack; 0 for a single one

    def unpack(self) -> QuantizedWeight:
        """Return the grid with its padding, a stack one below the other."""
        if not self.experts:
            return layout(self.layout).unpack(self)
        return QuantizedWeight.stacked([self.matrix(i).unpack() for i in range(self.experts)])

    @property
    def unpacked(self) -> bool:
        """Whether the weight is stored as it was, because its layout of `LOSSLESS` does not fit it."""
        return self.layout in LOSSLESS and self.qweight.is_floating_point() and self.qweight.itemsize > 1

    def to(self, device: torch.device) -> PackedLinear:
        return replace(self, qweight=self.qweight.to(device), scale_zero=self.scale_zero.to(device))

    def as_layout(self, name: str) -> PackedLinear:
        if name == self.layout or self.layout in LOSSLESS:
            return self
        grid = self.unpack()
        return pack_stack(grid, name, self.experts) if self.experts else pack(grid, name, self.in_features)

    def matrix(self, index: int) -> PackedLinear:
        """Return one weight of a stack."""
        return replace(self, qweight=self.qweight[index], scale_zero=self.scale_zero[index], experts=0)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight ``[N, K]`` in `dtype`, a stack as ``[E N, K]``."""
        if self.unpacked:
            return self.qweight.to(dtype).flatten(0, -2)
        if self.experts and self.layout in LOSSLESS:
            return torch.cat([self.matrix(i).dequantize(dtype) for i in range(self.experts)])
        if self.layout == LAYOUT_MXFP4:
            return unpack_mxfp4(self.qweight, self.scale_zero).to(dtype)
        if self.layout == lossless.LAYOUT_8BIT:
            return lossless.dequantize_8bit(self.qweight, self.scale_zero).to(dtype)
        if self.layout in lossless.LAYOUTS_12BIT:
            return lossless.unpack_12bit(self.qweight, self.scale_zero, self.out_features, self.in_features).to(dtype)
        return self.unpack().dequantize(dtype)[:, : self.in_features]


def pack_lossless(weights: Sequence[Tensor], layout_name: str = lossless.LAYOUT_12BIT) -> PackedLinear:
    """Pack weights ``[N_i, K]``, one below the other, in a layout of `LOSSLESS` on the CPU; see `unpacked`."""
    n, k = sum(map(len, weights)), weights[0].shape[1]
    if layout_name == lossless.LAYOUT_8BIT:
        found = lossless.pack_8bit(weights)
        if found is not None:
            return PackedLinear(layout_name, *found, 0, k, n)
    parts = [
        part.dequantize().to(part.dtype) if lossless.torchao_parts(part) else part.detach().cpu() for part in weights
    ]
    weight = torch.cat(parts) if len(parts) > 1 else parts[0]
    counts = lossless.count_upper_bytes(weight) if layout_name in lossless.LAYOUTS_12BIT else None
    if counts is None or lossless.patched_share(counts) > lossless.MAX_PATCHED_SHARE:
        return PackedLinear(layout_name, weight.clone(), torch.zeros(0, dtype=torch.int32), 0, k, n)
    return PackedLinear(layout_name, *lossless.pack_12bit(weight, counts), 0, k, n)


def pack_lossless_stack(
    stack: Tensor, layout_name: str = lossless.LAYOUT_12BIT, transposed: bool = False
) -> PackedLinear:
    """Pack stacked weights ``[E, N, K]`` (`transposed`: ``[E, K, N]``) as `pack_lossless`, one after another.

    A stack with the values of MXFP4 has the layout "mxfp4", whatever was asked for.
    """
    held = mxfp4_parts(stack)
    if held is not None:
        experts, k, n = stack.shape
        return PackedLinear(LAYOUT_MXFP4, *held, 0, k, n, experts)
    stack = stack.detach().cpu().mT if transposed else stack.detach().cpu()
    experts, n, k = stack.shape
    found = _pack_mxfp4(stack)
    if found is not None:
        return PackedLinear(LAYOUT_MXFP4, *found, 0, k, n, experts)
    _, length = lossless.shapes_12bit(n, k)
    units, side = None, torch.zeros((experts, *length), dtype=torch.int32)
    for i, weight in enumerate(stack):
        weight = weight.contiguous()
        counts = lossless.count_upper_bytes(weight)
        if lossless.patched_share(counts) > lossless.MAX_PATCHED_SHARE:
            return PackedLinear(
                layout_name, stack.contiguous().clone(), torch.zeros(0, dtype=torch.int32), 0, k, n, experts
            )
        one, patches = lossless.pack_12bit(weight, counts)
        if units is None:
            units = torch.empty((experts, *one.shape), dtype=torch.uint8)
        units[i], used = one, 5 + len(one) + 2 * int(patches[4 + len(one)])
        side[i, :used] = patches[:used]
    assert units is not None
    return PackedLinear(layout_name, units, side, 0, k, n, experts)


def _pack_mxfp4(stack: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return blocks and scales of stacked weights ``[E, N, K]``, None unless all have the values of MXFP4."""
    experts, n, k = stack.shape
    blocks = torch.empty((experts, n, k // GROUP, GROUP // 2), dtype=torch.uint8)  # not written, it costs nothing
    scales = torch.empty(blocks.shape[:-1], dtype=torch.uint8)
    for i, weight in enumerate(stack):
        found = find_mxfp4(weight)
        if found is None:
            return None
        blocks[i], scales[i] = found
    return blocks, scales


def tensors_of(name: str, n: int, k: int, group: int) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Return shapes and allowed dtypes of the tensors of a weight ``[N, K]``, for layouts that files may hold."""
    if name in lossless.LAYOUTS_12BIT:
        units, side = lossless.shapes_12bit(n, k)
        return {"qweight": (units, (torch.uint8,)), "scale_zero": (side, (torch.int32,))}
    if name == LAYOUT_MXFP4:
        groups = (n, k // GROUP)
        return {"qweight": ((*groups, GROUP // 2), (torch.uint8,)), "scale_zero": (groups, (torch.uint8,))}
    blocks, pairs = (-(-n // 16), k // group), (n, k // group, 2)
    native = ((*blocks, 16, 2), (torch.bfloat16,))
    qweight, scale_zero = {
        "plain": (((n, k // 2), (torch.uint8,)), (pairs, (torch.float32, torch.bfloat16))),
        "triton": (((n, k // 8), (torch.int32,)), (pairs, (torch.float16, torch.bfloat16))),
        "native": (((*blocks, group // 8, 64), (torch.uint8,)), native),
    }[name]
    return {"qweight": qweight, "scale_zero": scale_zero}


def linear_by_dequantizing(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias in plain torch, for layouts without their own kernel."""
    return F.linear(x, packed.dequantize(x.dtype), bias)


_ROWS = 4096  # a multiple of the C++ kernels' blocks


@dataclass(frozen=True)
class Layout:
    """Functions of one layout."""

    pack: Callable[[QuantizedWeight], tuple[Tensor, Tensor]]  # to qweight and scale_zero
    unpack: Callable[[PackedLinear], QuantizedWeight]
    # (x [..., K], packed, bias or None) -> x W^T + bias in x.dtype
    linear: Callable[[Tensor, PackedLinear, Tensor | None], Tensor] = linear_by_dequantizing


def layout(name: str) -> Layout:
    """Return the layout of a name; raise ValueError with the known ones."""
    check_choice("layout", name, tuple(LAYOUTS))
    return LAYOUTS[name]


def pack(weight: QuantizedWeight, layout_name: str, in_features: int | None = None) -> PackedLinear:
    """Pack a grid ``[N, K]``; `in_features`: without padding. Raises ValueError for sizes that no kernel has."""
    chosen = layout(layout_name)
    n, k = weight.shape
    in_features = k if in_features is None else in_features
    check_choice("group_size", weight.group_size, GROUP_SIZES)
    if not k - weight.group_size < in_features <= k:
        raise ValueError(f"in_features={in_features} does not end in the last group of {k} columns")
    qweight, scale_zero = chosen.pack(weight)
    return PackedLinear(layout_name, qweight, scale_zero, weight.group_size, in_features, n)


def pack_stack(weight: QuantizedWeight, layout_name: str, experts: int) -> PackedLinear:
    """Pack a grid of E weights ``[N, K]``, one below the other, as a stack of E; raise as `pack`."""
    packed = [pack(matrix, layout_name) for matrix in weight.split(experts)]
    if len({matrix.scale_zero.dtype for matrix in packed}) > 1:  # float16 holds the parameters of some only
        return pack_stack(weight.rounded(torch.bfloat16), layout_name, experts)
    qweight, scale_zero = (torch.stack([getattr(m, part) for m in packed]) for part in ("qweight", "scale_zero"))
    return replace(packed[0], qweight=qweight, scale_zero=scale_zero, experts=experts)


def _pairs(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    return torch.stack([weight.scale, weight.zero], dim=-1).to(dtype)


def parameter_dtype(weight: QuantizedWeight) -> torch.dtype:
    """Return the 16-bit dtype of scales and zero-points: bfloat16 if it is exact or float16 overflows."""
    # Twins round their grids to bfloat16 in every layout, so that all layouts have the same weights.
    if all(torch.equal(t.bfloat16().float(), t) for t in (weight.scale, weight.zero)):
        return torch.bfloat16
    largest = max(weight.scale.abs().max().item(), weight.zero.abs().max().item())
    smallest = weight.scale.abs().min().item()
    limits = torch.finfo(torch.float16)
    return torch.float16 if largest <= limits.max and smallest >= limits.tiny else torch.bfloat16


def _pack_triton(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    nibbles = weight.q.to(torch.int32).reshape(n, k // 8, 8)
    words = torch.zeros_like(nibbles[..., 0])
    for bit, feature in zip(range(0, 32, 4), _TRITON_FEATURES, strict=True):
        words |= nibbles[..., feature] << bit
    return words, _pairs(weight, parameter_dtype(weight))


def _unpack_triton(packed: PackedLinear) -> QuantizedWeight:
    n, words = packed.qweight.shape
    bits = torch.tensor([4 * _TRITON_FEATURES.index(j) for j in range(8)], device=packed.qweight.device)
    return _grid(packed, (packed.qweight[..., None] >> bits & 15).to(torch.uint8).reshape(n, 8 * words))


def _pack_plain(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    return weight.q[:, 0::2] | weight.q[:, 1::2] << 4, _pairs(weight, torch.float32)


def _unpack_plain(packed: PackedLinear) -> QuantizedWeight:
    q = torch.stack([packed.qweight & 15, packed.qweight >> 4], dim=-1)
    return _grid(packed, q.reshape(q.shape[0], -1))


def _grid(packed: PackedLinear, q: Tensor) -> QuantizedWeight:
    scale, zero = packed.scale_zero.float().unbind(-1)
    return QuantizedWeight(q, scale, zero, packed.group_size)


def _pack_native(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    # A few rows at a time: the head of a large vocabulary has half a billion weights.
    n, k = weight.shape
    shapes = tensors_of(NATIVE_LAYOUT, n, k, weight.group_size).values()
    packed = [torch.empty(shape, dtype=dtypes[0], device=weight.q.device) for shape, dtypes in shapes]
    for start in range(0, n, _ROWS):
        blocks = slice(start // 16, -(-min(start + _ROWS, n) // 16))
        for to, part in zip(packed, _pack_native_rows(weight.rows(slice(start, start + _ROWS))), strict=True):
            to[blocks] = part
    return packed[0], packed[1]


def _pack_native_rows(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    pad = (0, 0, 0, -weight.shape[0] % 16)
    q = F.pad(weight.q, pad).unflatten(1, (-1, weight.group_size // 8, 2, 4)).unflatten(0, (-1, 16))
    low, high = q.permute(4, 0, 2, 3, 1, 5)
    pairs = F.pad(_pairs(weight, torch.bfloat16), (0, 0, *pad)).unflatten(0, (-1, 16))
    return (low | high << 4).flatten(-2).contiguous(), pairs.transpose(1, 2).contiguous()


def _unpack_native(packed: PackedLinear) -> QuantizedWeight:
    lines = packed.qweight.unflatten(-1, (16, 4))
    q = torch.stack([lines & 15, lines >> 4], dim=-2).permute(0, 3, 1, 2, 4, 5)
    scale, zero = packed.scale_zero.float().transpose(1, 2).flatten(0, 1)[: packed.out_features].unbind(-1)
    return QuantizedWeight(q.flatten(2).flatten(0, 1)[: packed.out_features], scale, zero, packed.group_size)


def _linear_native(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    sizes = packed.out_features, packed.group_size
    y: Tensor = native.load().linear(x, packed.qweight, packed.scale_zero, bias, *sizes)
    return y


LAYOUTS = {
    TRITON_LAYOUT: Layout(_pack_triton, _unpack_triton),
    PLAIN_LAYOUT: Layout(_pack_plain, _unpack_plain),
    NATIVE_LAYOUT: Layout(_pack_native, _unpack_native, _linear_native),
}
