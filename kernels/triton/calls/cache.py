"""Over a static cache: from tensors to the launch that writes a slot, attends, does both, or moves a full window.

`ops` registers these functions as operators as they are. Buffers are made contiguous where a kernel wants them so; the
caches are taken as they lie, and both must lie alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.triton import launch
from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from river_compile.kernels.triton.devices import device_of, known
from river_compile.kernels.triton.heuristic import attention_splits
from river_compile.kernels.triton.kv_fill import KvFillSpec
from river_compile.kernels.triton.loader import dtype_name
from river_compile.kernels.triton.shift import ShiftSpec


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
) -> Tensor:
    """Splits q|k|v of one position, transforms the heads, writes one slot of the caches and returns the query.

    Args:
        qkv: ``[B, (H + 2 J) D]``, or any leading shape of B elements.
        q_norm, k_norm: ``[D]`` weights of the heads' norm, or None.
        cos, sin: ``[..., R]`` with 1 or B rows, as Hugging Face models give them; None for no rotary embedding.
        slot: int32 or int64, one element: the slot to write. Outside of 0..S - 1 nothing is written.
        k_cache, v_cache: ``[B, J, S, D]`` in qkv.dtype, features contiguous. Mutated.
        norm: "rms" or "rms_plus_one" where q_norm and k_norm are given, else "none".
        eps: of the norm.
        interleaved: whether rotated pairs are neighbours instead of R / 2 apart.

    Returns:
        The query ``[B, H, D]`` in qkv.dtype.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together.
    """
    how = (norm, eps, interleaved)
    describe, given, q = _filling(qkv, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, *how)
    given["q"] = q
    launch.chosen(("kv_fill", *how), given, 1, describe)(given)
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
) -> Tensor:
    """Does in one launch what `kv_fill` and then `decode_attention` do, and may count the token.

    Args:
        qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, norm, eps, interleaved: as of `kv_fill`.
        slot: the slot to write, as of `kv_fill`; None where `counter` is given.
        counter: int32 or int64, one element: the slot to write, to which one is added afterwards; or None. Mutated.
        mask, scale, softcap: as of `decode_attention`; the mask says of the new slot too whether it takes part.

    Returns:
        ``[B, H, D]`` in qkv.dtype.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together, or not one of slot and counter.
    """
    place = slot if counter is None else counter
    if place is None or (slot is not None and counter is not None):
        raise ValueError("give a slot or a counter, which is one that advances")
    how = (norm, eps, interleaved)
    fill, given, out = _filling(qkv, q_norm, k_norm, cos, sin, place, k_cache, v_cache, *how)
    advance = counter is not None

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap, fill(), advance)

    given |= launch.present(mask=None if mask is None else mask.contiguous()) | {"out": out}
    launch.chosen(("attend", *how, scale, softcap, advance), given, 1, describe)(given)
    return out


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
) -> tuple[Callable[[], KvFillSpec], dict[str, Tensor], Tensor]:
    """Returns what describes a call that fills a slot, its buffers but for the result, and an empty ``[B, H, D]``."""
    b, kv_heads, slots, d = k_cache.shape
    heads = qkv.shape[-1] // d - 2 * kv_heads
    if qkv.numel() != b * (heads + 2 * kv_heads) * d or heads < 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}: not one position of q|k|v for caches of {(b, kv_heads, d)}"
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin go together; one of them is None")
    tables: dict[str, Tensor] = {}
    if cos is not None and sin is not None:
        tables = {
            "cos": cos.reshape(-1, cos.shape[-1]).contiguous(),
            "sin": sin.reshape(-1, sin.shape[-1]).contiguous(),
        }
    others = launch.present(q_norm=q_norm, k_norm=k_norm)
    given = {"qkv": qkv.reshape(b, -1, d).contiguous(), "slot": slot.reshape(-1), **others, **tables}
    given |= {"k_cache": k_cache, "v_cache": v_cache}

    def describe() -> KvFillSpec:
        strides, index = _cache_strides(k_cache, v_cache), dtype_name(slot)
        how: dict[str, Any] = {"head_norm": norm, "eps": eps, "cache_strides": strides, "index_dtype": index}
        if tables:
            rows, features = tables["cos"].shape
            how |= {"rotary_dim": features, "rotary_dtype": dtype_name(tables["cos"]), "rotary_rows": rows}
        return KvFillSpec(b, heads, kv_heads, d, slots, dtype=dtype_name(qkv), interleaved=interleaved, **how)

    return describe, given, qkv.new_empty((b, heads, d))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attends from one query position to the slots of a static cache.

    Args:
        q: ``[B, H, D]``.
        k_cache, v_cache: ``[B, J, S, D]`` in q.dtype, features contiguous; J divides H.
        mask: ``[B, S]``: bool, True for slots that take part, or floating, added to the scores, where at most half of
            the dtype's least number leaves a slot out. None for all. A row without any slot gives 0.
        scale: of the scores.
        softcap: c in c tanh(score / c); 0 for none.

    Returns:
        ``[B, H, D]`` in q.dtype.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together.
    """
    b, _, d = q.shape
    if k_cache.shape[0] != b or k_cache.shape[3] != d:
        raise ValueError(f"q has shape {tuple(q.shape)} and the caches have {tuple(k_cache.shape)}: B or D differs")
    out = q.new_empty(q.shape)
    given = {"q": q.contiguous(), "k_cache": k_cache, "v_cache": v_cache, "out": out}
    if mask is not None:
        given["mask"] = mask.contiguous()

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap)

    launch.chosen(("decode_attention", scale, softcap), given, 1, describe)(given)
    return out


def _attention(
    out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    fill: KvFillSpec | None = None,
    advance: bool = False,
) -> DecodeAttentionSpec:
    (b, heads, d), (kv_heads, slots) = out.shape, k_cache.shape[1:3]
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
        splits=attention_splits(b * kv_heads, slots, known(device_of(out)), heads // kv_heads, d),
        cache_strides=_cache_strides(k_cache, v_cache),
        fill=fill,
        advance=advance,
    )


def shift(k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """Moves all entries of a full window up by one slot, and returns the slot that this frees.

    Args:
        k_cache, v_cache: ``[B, J, S, D]`` of one dtype, features contiguous. Mutated; the last slot stays as it is.

    Returns:
        S - 1, int64 ``[1]``.

    Raises:
        ValueError: caches whose shapes, strides or dtypes do not fit together.
    """
    b, kv_heads, slots, d = k_cache.shape
    slot = k_cache.new_empty(1, dtype=torch.int64)
    given = {"k_cache": k_cache, "v_cache": v_cache, "slot": slot}

    def describe() -> ShiftSpec:
        strides = _cache_strides(k_cache, v_cache)
        return ShiftSpec(b, kv_heads, kv_heads, d, slots, dtype=dtype_name(k_cache), cache_strides=strides)

    launch.chosen(("shift",), given, 1, describe)(given)
    return slot


def _cache_strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, ...]:
    """Returns the strides of sequence, head and slot that both caches share, empty for contiguous ones."""
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            "the caches must have one shape and stride with contiguous features; these have "
            f"{tuple(k_cache.shape)}, {k_cache.stride()} and {tuple(v_cache.shape)}, {v_cache.stride()}"
        )
    return () if k_cache.is_contiguous() else k_cache.stride()[:3]
