"""From tensors to a kernel: describes the call as a spec, picks its tile, loads it and launches it.

CUDA (and ROCm) tensors run compiled kernels, CPU tensors the same kernels in Triton's interpreter, which is exact and
slow: it is there for tests, and gets large tiles, since its time goes by operations. Buffers are made contiguous where
a kernel wants them so; rows of x may be strided.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from river_compile.kernels.quant.layouts import PackedLinear

from .decode_attention import DecodeAttentionSpec
from .exit_score import ExitScoreSpec
from .heuristic import DEFAULT_DEVICE, DEVICES, Device, attention_splits, best_tile, interpreter_tile, untiled
from .kv_fill import KvFillSpec
from .loader import load


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
    """Names the device that the heuristic tiles for; a CPU tensor's attention is split as on the default GPU."""
    return device_name(tensor.device.index or 0) if tensor.is_cuda else DEFAULT_DEVICE


def model_of(tensor: torch.Tensor) -> Device:
    """Returns what the cost model knows of the tensor's device, or of the default one where it knows nothing."""
    return DEVICES.get(device_of(tensor), DEVICES[DEFAULT_DEVICE])


def linear(
    x: torch.Tensor,
    weight: PackedLinear | torch.Tensor,
    *,
    norm: Norm,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    gated: bool = False,
) -> torch.Tensor:
    """Runs a linear kernel.

    Args:
        x: ``[..., K]``.
        weight: packed in the layout "triton", or dense ``[N, K]`` in x.dtype; a gated one has gate rows, then up rows.
        norm: in front.
        bias: ``[N]`` (``[2 N]`` gated) in x.dtype.
        residual: ``[..., N]`` in x.dtype, added last.
        activation: after the bias.
        gated: whether `weight` holds a gate and an up projection.

    Returns:
        ``[..., N]`` in x.dtype; `weight` has N rows, or 2 N if gated.

    Raises:
        ValueError: a buffer of the wrong shape or dtype, or a combination that no kernel has.
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
    tiled = best_tile(spec, device_of(x), x2.shape[0]) if x.is_cuda else interpreter_tile(spec)
    kernel = load(tiled, interpret=not x.is_cuda)
    buffers = {"x": x2, "norm_weight": norm.weight, "norm_bias": norm.bias, "bias": bias, "y": y}
    if residual is not None:
        buffers["residual"] = residual.reshape(-1, n).contiguous()
    if packed:
        buffers |= {"qweight": weight.qweight, "scale_zero": weight.scale_zero.view(torch.int32).squeeze(-1)}
    else:
        buffers["weight"] = weight
    buffers = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    shapes = spec.shapes(x2.shape[0])
    _expect(**{name: (buffer, shapes[name]) for name, buffer in buffers.items() if name != "x"})
    kernel(rows=x2.shape[0], **buffers)
    return y.reshape(*x.shape[:-1], n)


def fill_kv(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    slot: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
) -> torch.Tensor:
    """Runs the `kv_fill` kernel; arguments and result as in `ops.kv_fill`.

    Raises:
        ValueError: caches of another shape or layout than the kernel reads, or cos and sin of neither 1 nor B rows.
    """
    b, kv_heads, slots, d = k_cache.shape
    heads = qkv.shape[-1] // d - 2 * kv_heads
    if qkv.numel() != b * (heads + 2 * kv_heads) * d or heads < 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: not one position of q|k|v for caches of {(b, kv_heads, d)}"
        )
    rotary_dim = 0 if cos is None else cos.shape[-1]
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together; one of them is None")
    spec = KvFillSpec(
        b,
        heads,
        kv_heads,
        d,
        slots,
        dtype=dtype_name(qkv.dtype),
        rotary_dim=rotary_dim,
        rotary_dtype="bfloat16" if cos is None else dtype_name(cos.dtype),
        interleaved=interleaved,
        rotary_rows=1 if cos is None else cos.numel() // rotary_dim,
        bias=bias is not None,
        head_norm=norm,
        eps=eps,
        cache_strides=_cache_strides(k_cache, v_cache),
        index_dtype=dtype_name(slot.dtype),
    )
    q = torch.empty((b, heads, d), dtype=qkv.dtype, device=qkv.device)
    table = (spec.rotary_rows, rotary_dim)
    inputs = {
        "bias": (bias, (spec.all_heads * d,)),
        "q_norm": (q_norm, (d,)),
        "k_norm": (k_norm, (d,)),
        "cos": (cos if cos is None else cos.reshape(table).contiguous(), table),
        "sin": (sin if sin is None else sin.reshape(table).contiguous(), table),
        "slot": (slot.reshape(-1), (1,)),
    }
    inputs = {name: entry for name, entry in inputs.items() if entry[0] is not None}
    _expect(**inputs)
    buffers = {name: tensor for name, (tensor, _) in inputs.items()}
    load(spec, interpret=not qkv.is_cuda)(qkv=qkv.contiguous(), k_cache=k_cache, v_cache=v_cache, q=q, **buffers)
    return q


def run_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    length: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """Runs the `decode_attention` kernel; arguments and result as in `ops.decode_attention`."""
    b, heads, d = q.shape
    kv_heads, slots = k_cache.shape[1], k_cache.shape[2]
    if k_cache.shape[0] != b or k_cache.shape[-1] != d:
        raise ValueError(f"q has shape {tuple(q.shape)} and the caches have {tuple(k_cache.shape)}: B or D differs")
    spec = DecodeAttentionSpec(
        b,
        heads,
        kv_heads,
        d,
        slots,
        scale,
        dtype=dtype_name(q.dtype),
        window=window,
        softcap=softcap,
        mask=mask is not None,
        mask_dtype="bool" if mask is None else dtype_name(mask.dtype),
        counted=length is not None,
        splits=attention_splits(b * kv_heads, min(slots, window or slots), model_of(q)),
        cache_strides=_cache_strides(k_cache, v_cache),
        index_dtype="int64" if length is None else dtype_name(length.dtype),
    )
    out = torch.empty((b, heads, d), dtype=q.dtype, device=q.device)
    buffers = {"q": q.contiguous(), "k_cache": k_cache, "v_cache": v_cache, "out": out}
    if length is not None:
        buffers["length"] = length
        _expect(length=(length.reshape(-1), (1,)))
    if mask is not None:
        buffers["mask"] = mask.contiguous()
        _expect(mask=(buffers["mask"], (b, slots)))
    load(spec, interpret=not q.is_cuda)(**buffers)
    return out


def residual_score(
    update: torch.Tensor, residual: torch.Tensor, previous: torch.Tensor, threshold: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Runs the `exit_score` kernel.

    Args:
        update, residual, previous, threshold: as in `ops.residual_exit_score`; without a threshold nothing is decided.

    Returns:
        hidden and score and, where there is a threshold, similarity and flag; as in `ops.residual_exit_score`.
    """
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    d = update.shape[-1]
    spec = ExitScoreSpec(update.numel() // d, d, dtype_name(update.dtype), decides=threshold is not None)
    results = {
        "hidden": torch.empty(update.shape, dtype=update.dtype, device=update.device),
        "score": torch.empty((), dtype=torch.float32, device=update.device),
    }
    buffers = {"update": update, "residual": residual, "previous": previous}
    buffers = {name: tensor.contiguous() for name, tensor in buffers.items()}
    if threshold is not None:
        results["similarity"] = torch.empty(update.shape[:-1], dtype=torch.float32, device=update.device)
        results["flag"] = torch.empty((), dtype=torch.bool, device=update.device)
        buffers["threshold"] = threshold
    load(spec, interpret=not update.is_cuda)(**buffers, **results)
    return results


def _expect(**tensors: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """Raises a ValueError that names the first tensor whose shape is not the one beside it, or that has gaps."""
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this call needs {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")


def _cache_strides(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, ...]:
    """Returns the strides of sequence, head and slot that both caches share, empty for contiguous ones."""
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            "the caches must have one shape and stride with contiguous features; these have "
            f"{tuple(k_cache.shape)}, {k_cache.stride()} and {tuple(v_cache.shape)}, {v_cache.stride()}"
        )
    return () if k_cache.is_contiguous() else k_cache.stride()[:3]
