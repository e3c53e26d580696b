"""From tensors to a kernel: describes the call as a spec, picks its tile, loads it and launches it.

CUDA (and ROCm) tensors run compiled kernels, CPU tensors the same kernels in Triton's interpreter, which is exact and
slow: it is there for tests, and gets large tiles, since its time goes by operations. Buffers are made contiguous where
a kernel wants them so; rows of x may be strided.
"""

from __future__ import annotations

import torch

from river_compile.kernels.quant.layouts import PackedLinear

from .decode_attention import DecodeAttentionSpec
from .devices import device_of, known
from .exit_score import ExitScoreSpec
from .heuristic import attention_splits, best_tile, interpreter_tile, untiled
from .kv_fill import KvFillSpec
from .loader import load


def dtype_name(dtype: torch.dtype) -> str:
    """Returns "bfloat16" for torch.bfloat16 and so on."""
    return str(dtype).removeprefix("torch.")


def linear(
    x: torch.Tensor,
    weight: PackedLinear | torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm: str,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    activation: str,
    gated: bool,
) -> torch.Tensor:
    """Runs a linear kernel; `weight` is packed in the layout "triton" or dense, the rest as in `ops.linear`.

    Raises:
        ValueError: a buffer of the wrong shape or dtype, or a combination that no kernel has.
    """
    buffers: dict[str, torch.Tensor | None]
    if isinstance(weight, PackedLinear):
        pairs = weight.scale_zero.view(torch.int32).squeeze(-1)
        buffers = {"qweight": weight.qweight, "scale_zero": pairs}
        matrix = {"group_size": weight.group_size, "parameter_dtype": dtype_name(weight.scale_zero.dtype)}
        weight_rows = weight.out_features
    else:
        buffers, matrix = {"weight": weight}, {"weights": "dense", "group_size": 0}
        weight_rows = weight.shape[0]
    n, k = weight_rows // (2 if gated else 1), x.shape[-1]
    x2 = x.reshape(-1, k)
    rows = x2.shape[0]
    if rows > 1 and (x2.stride(1) != 1 or x2.stride(0) < k):
        x2 = x2.contiguous()
    y = torch.empty((rows, n), dtype=x.dtype, device=x.device)
    if rows == 0:
        return y.reshape(*x.shape[:-1], n)
    spec = untiled(
        rows,
        k,
        n,
        **matrix,
        dtype=dtype_name(x.dtype),
        norm=norm,
        eps=eps,
        norm_bias=norm_bias is not None,
        bias=bias is not None,
        residual=residual is not None,
        activation=activation,
        gated=gated,
        x_stride=x2.stride(0) if rows > 1 and x2.stride(0) != k else 0,
    )
    spec = best_tile(spec, device_of(x), rows) if x.is_cuda else interpreter_tile(spec)
    buffers |= {"norm_weight": norm_weight, "norm_bias": norm_bias, "bias": bias, "y": y}
    buffers["residual"] = None if residual is None else residual.reshape(-1, n).contiguous()
    wanted = spec.buffers(rows)
    given = _checked({name: (buffers[name], shape) for name, (_, shape) in wanted.items() if name != "x"})
    load(spec, interpret=not x.is_cuda)(rows=rows, x=x2, **given)
    return y.reshape(*x.shape[:-1], n)


def kv_fill(
    qkv: torch.Tensor,
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
        head_norm=norm,
        eps=eps,
        cache_strides=_cache_strides(k_cache, v_cache),
        index_dtype=dtype_name(slot.dtype),
    )
    q = torch.empty((b, heads, d), dtype=qkv.dtype, device=qkv.device)
    table = (spec.rotary_rows, rotary_dim)
    inputs = _checked(
        {
            "q_norm": (q_norm, (d,)),
            "k_norm": (k_norm, (d,)),
            "cos": (cos if cos is None else cos.reshape(table).contiguous(), table),
            "sin": (sin if sin is None else sin.reshape(table).contiguous(), table),
            "slot": (slot.reshape(-1), (1,)),
        }
    )
    kernel = load(spec, interpret=not qkv.is_cuda)
    kernel(rows=1, qkv=qkv.contiguous(), k_cache=k_cache, v_cache=v_cache, q=q, **inputs)
    return q


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Runs the `decode_attention` kernel; arguments and result as in `ops.decode_attention`.

    Raises:
        ValueError: caches of another shape or layout than the kernel reads, or a mask of another shape.
    """
    b, heads, d = q.shape
    kv_heads, slots = k_cache.shape[1:3]
    if k_cache.shape[0] != b or k_cache.shape[3] != d:
        raise ValueError(f"q has shape {tuple(q.shape)} and the caches have {tuple(k_cache.shape)}: B or D differs")
    spec = DecodeAttentionSpec(
        b,
        heads,
        kv_heads,
        d,
        slots,
        scale,
        dtype=dtype_name(q.dtype),
        softcap=softcap,
        mask=mask is not None,
        mask_dtype="bool" if mask is None else dtype_name(mask.dtype),
        splits=attention_splits(b * kv_heads, slots, known(device_of(q))),
        cache_strides=_cache_strides(k_cache, v_cache),
    )
    out = torch.empty((b, heads, d), dtype=q.dtype, device=q.device)
    given = _checked({"mask": (mask if mask is None else mask.contiguous(), (b, slots))})
    load(spec, interpret=not q.is_cuda)(rows=1, q=q.contiguous(), k_cache=k_cache, v_cache=v_cache, out=out, **given)
    return out


def residual_score(
    update: torch.Tensor, residual: torch.Tensor, previous: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the `exit_score` kernel; arguments and result as in `ops.residual_score`.

    Raises:
        ValueError: tensors of different shapes.
    """
    if not update.shape == residual.shape == previous.shape:
        shapes = ", ".join(str(tuple(t.shape)) for t in (update, residual, previous))
        raise ValueError(f"update, residual and previous have one shape; these have {shapes}")
    d = update.shape[-1]
    hidden = torch.empty(update.shape, dtype=update.dtype, device=update.device)
    score = torch.empty((), dtype=torch.float32, device=update.device)
    inputs = {"update": update.contiguous(), "residual": residual.contiguous(), "previous": previous.contiguous()}
    spec = ExitScoreSpec(update.numel() // d, d, dtype_name(update.dtype))
    load(spec, interpret=not update.is_cuda)(rows=1, hidden=hidden, score=score, **inputs)
    return hidden, score


def _checked(tensors: dict[str, tuple[torch.Tensor | None, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    """Returns the tensors that are there; raises a ValueError for one that has gaps or not the shape beside it."""
    given = {}
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this call needs {shape}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")
        given[name] = tensor
    return given


def _cache_strides(k_cache: torch.Tensor, v_cache: torch.Tensor) -> tuple[int, ...]:
    """Returns the strides of sequence, head and slot that both caches share, empty for contiguous ones."""
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            "the caches must have one shape and stride with contiguous features; these have "
            f"{tuple(k_cache.shape)}, {k_cache.stride()} and {tuple(v_cache.shape)}, {v_cache.stride()}"
        )
    return () if k_cache.is_contiguous() else k_cache.stride()[:3]
