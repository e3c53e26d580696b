"""From tensors to a kernel: describes the call as a spec, picks its tile, loads it and launches it.

CUDA (and ROCm) tensors run compiled kernels, CPU tensors the same kernels in Triton's interpreter, which is exact and
slow: it is there for tests. Buffers are made contiguous where a kernel wants them so; rows of x may be strided.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from river_compile.kernels.heuristic import DEFAULT_DEVICE, best_tile, untiled
from river_compile.kernels.loader import load
from river_compile.kernels.pack import PackedLinear


@dataclass(frozen=True)
class Norm:
    """The normalisation in front of a linear kernel.

    Attributes:
        kind: "none", "rms", "rms_plus_one" or "layer".
        weight, bias: ``[K]`` in the activations' dtype; the bias for "layer" alone.
        eps: added to the variance.
    """

    kind: str = "none"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    eps: float = 1e-6


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "bfloat16" for torch.bfloat16 and so on."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def device_name(index: int) -> str:
    """Names a GPU for the heuristic: "sm_90", "gfx942"."""
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return architecture.split(":")[0] or f"sm_{properties.major}{properties.minor}"


def device_of(tensor: torch.Tensor) -> str:
    """Names the device that the heuristic tiles for; a CPU tensor gets the default GPU's tiles."""
    return device_name(tensor.device.index or 0) if tensor.is_cuda else DEFAULT_DEVICE


def linear(
    kind: str,
    x: torch.Tensor,
    weight: PackedLinear | torch.Tensor,
    *,
    norm: Norm,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> torch.Tensor:
    """Runs a linear kernel (see `linear` for the families and the order of the epilogue).

    Args:
        kind: the family.
        x: ``[..., K]``.
        weight: packed in the layout "triton", or dense ``[N, K]`` in x.dtype; a gated one has gate rows, then up rows.
        norm: in front.
        bias: ``[N]`` (``[2 N]`` gated) in x.dtype.
        residual: ``[..., N]`` in x.dtype, added last.
        activation: after the bias.
        gated: whether `weight` holds a gate and an up projection.

    Returns:
        ``[..., N]`` in x.dtype; `weight` has N rows, or 2 N if gated.
    """
    packed = isinstance(weight, PackedLinear)
    rows_out = weight.out_features if packed else weight.shape[0]
    n, k = rows_out // (2 if gated else 1), x.shape[-1]
    x2 = x.reshape(-1, k)
    if x2.shape[0] > 1 and (x2.stride(1) != 1 or x2.stride(0) < k):
        x2 = x2.contiguous()
    y = torch.empty((x2.shape[0], n), dtype=x.dtype, device=x.device)
    if x2.shape[0] == 0:
        return y.reshape(*x.shape[:-1], n)
    spec = untiled(
        kind,
        x2.shape[0],
        k,
        n,
        weights="w4" if packed else "dense",
        group_size=weight.group_size if packed else 0,
        dtype=dtype_name(x.dtype),
        out_dtype=dtype_name(x.dtype),
        parameter_dtype=dtype_name(weight.scale_zero.dtype) if packed else "float16",
        norm=norm.kind,
        eps=norm.eps,
        norm_bias=norm.bias is not None,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        gated=gated,
        x_stride=x2.stride(0) if x2.shape[0] > 1 and x2.stride(0) != k else 0,
    )
    kernel = load(best_tile(spec, device_of(x), x2.shape[0]), interpret=not x.is_cuda)
    buffers = {"x": x2, "norm_weight": norm.weight, "norm_bias": norm.bias, "bias": bias, "y": y}
    if residual is not None:
        buffers["residual"] = residual.reshape(-1, n).contiguous()
    if packed:
        buffers |= {"qweight": weight.qweight, "scale_zero": weight.scale_zero.view(torch.int32)}
    else:
        buffers["weight"] = weight
    kernel(rows=x2.shape[0], **{name: buffer for name, buffer in buffers.items() if buffer is not None})
    return y.reshape(*x.shape[:-1], n)
