"""The 4-bit products that torch itself has, as a baseline: `aten._weight_int4pack_mm` in the place of linear layers.

It is the kernel behind gpt-fast's and torchao's int4 weights: bfloat16 activations, a scale and a zero of bfloat16 for
each group, weights in the order of the tensor cores' fragments. ATen's int4 kernel for a CPU computes the same from the
same grid. Not handled: layers whose sizes it does not take (`fits`), which stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from river_compile.kernels.quant.grid import QuantizedWeight, quantize

_INNER_K_TILES = 8  # of the CUDA kernel's layout: 8 tiles of 16 input features lie side by side
_ROWS, _FEATURES = 8, 16 * _INNER_K_TILES  # of which the sizes of a matrix must be multiples


def fits(out_features: int, in_features: int) -> bool:
    """Whether torch's kernel takes a matrix of this size."""
    return out_features % _ROWS == 0 and in_features % _FEATURES == 0


def packed_for_cuda(grid: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the weights in the kernel's order, and scales and zeros ``[K / G, N, 2]`` in bfloat16."""
    q = grid.q.to(torch.uint8)
    pairs = q[:, ::2] << 4 | q[:, 1::2]  # two weights in a byte, the first one in the high half
    weight = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
    return weight, scales_and_zeros(grid)


def packed_for_cpu(grid: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Return the same for the kernel of a CPU, whose order of weights differs by processor; N is a multiple of 16."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(grid.q.int(), 1), scales_and_zeros(grid)


def scales_and_zeros(grid: QuantizedWeight) -> Tensor:
    """Return ``[K / G, N, 2]`` in bfloat16; the kernel computes ``(q - 8) * scale + zero``, as our grid does."""
    return torch.stack([grid.scale, grid.zero], -1).transpose(0, 1).to(torch.bfloat16).contiguous()


class Int4Linear(nn.Module):
    """A linear layer without bias, in 4 bits."""

    def __init__(self, weight: Tensor, group_size: int) -> None:
        super().__init__()
        grid = quantize(weight, group_size, "rtn")
        self._on_gpu, self._group_size = weight.is_cuda, group_size
        qweight, scale_zero = packed_for_cuda(grid) if self._on_gpu else packed_for_cpu(grid)
        self.register_buffer("qweight", qweight)
        self.register_buffer("scale_zero", scale_zero)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T``, ``[..., N]`` in bfloat16, for x ``[..., K]``."""
        aten, flat = torch.ops.aten, x.reshape(-1, x.shape[-1])
        product = aten._weight_int4pack_mm if self._on_gpu else aten._weight_int4pack_mm_for_cpu
        return product(flat, self.qweight, self._group_size, self.scale_zero).unflatten(0, x.shape[:-1])


def use_int4(model: nn.Module, group_size: int) -> int:
    """Put 4-bit products in the place of a model's linear layers, all but its head; return how many."""
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.bias is None and name != "lm_head" and fits(*child.weight.shape)
    ]
    for parent, name, child in found:
        setattr(parent, name, Int4Linear(child.weight.detach(), group_size))
    return len(found)
