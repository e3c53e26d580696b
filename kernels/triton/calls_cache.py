"""Kernels on a static cache: from tensors to launches that fill slots, attend, or do both.

`operators` registers the public functions. Inputs are made contiguous if a kernel requires it; the two caches must have
the same strides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from river_compile.kernels import MAX_EXACT_ROWS
from river_compile.kernels.cache_ops import one_place
from river_compile.kernels.portable import cache_attention
from river_compile.kernels.triton.cache import DecodeAttentionSpec, KvFillSpec
from river_compile.kernels.triton.loader import device_of, drop_none, dtype_name, find_launch
from river_compile.kernels.triton.tiles import attention_splits

# A function that describes the call, its buffers without the query, and the empty query.
_Filling: TypeAlias = tuple[Callable[[], KvFillSpec], dict[str, Tensor], Tensor]


def kv_fill(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    half_tables: bool = False,
) -> Tensor:
    """Run a kernel as `cache_ops.kv_fill`; raise a ValueError for inconsistent shapes, strides or dtypes."""
    several = qkv.dim() == 3 and qkv.shape[1] > 1
    how = (norm, eps, interleaved, half_tables)
    made = _filling(qkv, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, *how, several=several)
    q = _fill(made, (*how, False, several))
    return q.unflatten(0, qkv.shape[:2]) if several else q


def _fill(made: _Filling, how: tuple[object, ...]) -> Tensor:
    """Fill the slots of a call, which depends on `how` and its tensors, and return the query ``[B T, H, D]``."""
    describe, given, q = made
    given["q"] = q
    positions = len(q) // len(given["k_cache"])
    find_launch(("kv_fill", *how), given, positions, describe)(given)
    return q


def attend(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slot: Tensor | None,
    counter: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    several: bool = False,
    causal: bool = False,
    sinks: Tensor | None = None,
    half_tables: bool = False,
) -> Tensor:
    """Run kernels as `cache_ops.attend`; raise as `kv_fill`."""
    place = one_place(slot, counter)
    how, advance = (norm, eps, interleaved, half_tables), counter is not None
    if several:  # two launches; PyTorch attends from more than MAX_EXACT_ROWS positions
        fills = (qkv, q_norm, k_norm, cos, sin, place, k_cache, v_cache)
        q = _fill(_filling(*fills, *how, counts=advance, several=True), (*how, advance, True))
        heads = q.unflatten(0, qkv.shape[:2])
        return _attend_from_several(heads, k_cache, v_cache, mask, scale, softcap, counter, causal, sinks)
    fill, given, out = _filling(qkv, q_norm, k_norm, cos, sin, place, k_cache, v_cache, *how)

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap, sinks, fill=fill(), advance=advance)

    given |= drop_none(mask=None if mask is None else mask.contiguous(), sinks=sinks) | {"out": out}
    find_launch(("attend", *how, scale, softcap, advance), given, 1, describe)(given)
    return out


def _attend_from_several(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    counter: Tensor | None,
    causal: bool,
    sinks: Tensor | None,
) -> Tensor:
    """Attend from q ``[B, T, H, D]`` to filled slots, and advances the counter; see `attend`."""
    b, positions = q.shape[:2]
    if b * positions > MAX_EXACT_ROWS:
        if counter is not None:
            counter.add_(positions)
        if softcap or sinks is not None:
            return cache_attention(q, k_cache, v_cache, mask, scale, softcap, causal, sinks)
        heads = (q.transpose(1, 2), k_cache, v_cache, mask)
        attended = F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2).contiguous()
    out = q.new_empty((b * positions, *q.shape[2:]))
    slot = None if counter is None else counter.reshape(-1)
    rows = None if mask is None else mask.flatten(0, 1).contiguous()
    if causal:
        rows = torch.ones(1, positions, k_cache.shape[2], dtype=torch.bool, device=q.device).tril()
    given = {"q": q.flatten(0, 1), "k_cache": k_cache, "v_cache": v_cache, "out": out}
    given |= drop_none(slot=slot, mask=rows, sinks=sinks)

    def describe() -> DecodeAttentionSpec:
        how: dict[str, Any] = {"positions": None, "mask_rows": 0 if rows is None else len(rows)}
        if slot is not None:
            how |= {"advance": True, "index_dtype": dtype_name(slot)}
        return _attention(out, k_cache, v_cache, rows, scale, softcap, sinks, **how)

    find_launch(("attend from several", scale, softcap), given, positions, describe)(given)
    return out.view(q.shape)


def _filling(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slot: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    half_tables: bool,
    counts: bool = False,
    several: bool = False,
) -> _Filling:
    """Prepare a call that fills slots; the empty query is ``[B T, H, D]``."""
    b, kv_heads, slots, d = k_cache.shape
    heads = qkv.shape[-1] // d - 2 * kv_heads
    positions = qkv.shape[1] if several else 1
    if qkv.numel() != b * positions * (heads + 2 * kv_heads) * d or heads < 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: not one position of q|k|v for caches of {(b, kv_heads, d)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together; give both or neither")
    tables: dict[str, Tensor] = {}
    if cos is not None and sin is not None:
        tables = {
            "cos": cos.reshape(-1, cos.shape[-1]).contiguous(),
            "sin": sin.reshape(-1, sin.shape[-1]).contiguous(),
        }
    others = drop_none(q_norm=q_norm, k_norm=k_norm)
    given = {"qkv": qkv.reshape(b * positions, -1, d).contiguous(), "slot": slot.reshape(-1), **others, **tables}
    given |= {"k_cache": k_cache, "v_cache": v_cache}

    def describe() -> KvFillSpec:
        strides, index = _cache_strides(k_cache, v_cache), dtype_name(slot)
        how: dict[str, Any] = {"head_norm": norm, "eps": eps, "cache_strides": strides, "index_dtype": index}
        if tables:
            lines, features = tables["cos"].shape
            rows = {"rotary_rows": lines // positions}
            how |= {"rotary_dim": features * (2 if half_tables else 1), "half_tables": half_tables, **rows}
            how |= {"rotary_dtype": dtype_name(tables["cos"])}
        if several:
            how |= {"positions": None, "counts": counts}
        return KvFillSpec(b, heads, kv_heads, d, slots, dtype=dtype_name(qkv), interleaved=interleaved, **how)

    return describe, given, qkv.new_empty((b * positions, heads, d))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Run a kernel as `cache_ops.decode_attention`; raise as `kv_fill`."""
    b, _, d = q.shape
    if k_cache.shape[0] != b or k_cache.shape[3] != d:
        raise ValueError(f"q has shape {tuple(q.shape)} and the caches have {tuple(k_cache.shape)}: B or D differs")
    out = q.new_empty(q.shape)
    given = {"q": q.contiguous(), "k_cache": k_cache, "v_cache": v_cache, "out": out}
    given |= drop_none(mask=None if mask is None else mask.contiguous(), sinks=sinks)

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap, sinks)

    find_launch(("decode_attention", scale, softcap), given, 1, describe)(given)
    return out


def _attention(
    out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    **others: Any,
) -> DecodeAttentionSpec:
    (_, heads, d), (b, kv_heads, slots, _) = out.shape, k_cache.shape
    # With open positions, split as for one sequence, so that its bits do not depend on the batch either.
    sequences = b if others.get("positions", 1) else 1
    return DecodeAttentionSpec(
        b,
        heads,
        kv_heads,
        d,
        slots,
        scale,
        dtype=dtype_name(out),
        softcap=softcap,
        mask=mask is not None,
        mask_dtype="bool" if mask is None else dtype_name(mask),
        sinks_dtype=None if sinks is None else dtype_name(sinks),
        splits=attention_splits(sequences * kv_heads, slots, d, device_of(out)),
        cache_strides=_cache_strides(k_cache, v_cache),
        **others,
    )


def _cache_strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, ...]:
    """Return the strides of sequence, head and slot that both caches share, empty for contiguous ones."""
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            "the caches must have one shape and stride with contiguous features; these have "
            f"{tuple(k_cache.shape)}, {k_cache.stride()} and {tuple(v_cache.shape)}, {v_cache.stride()}"
        )
    return () if k_cache.is_contiguous() else k_cache.stride()[:3]
