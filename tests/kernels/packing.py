import torch

from river_compile.kernels.quant.data_free import quantize
from river_compile.kernels.quant.layouts import PackedLinear, pack


def pack_linear(weight: torch.Tensor, group_size: int, layout: str, quantizer: str = "hqq") -> PackedLinear:
    """Quantizes and packs a weight ``[N, K]``, padded with the row's last value to whole groups."""
    k = weight.shape[-1]
    padding = weight[:, -1:].expand(-1, -k % group_size)
    return pack(quantize(torch.cat([weight, padding], dim=1), group_size, quantizer), layout, k)
