"""Over a static cache: from tensors to the launch that writes a slot, attends, does both, or moves a full window.

`ops` registers these functions as operators as they are. Buffers are made contiguous where a kernel wants them so; the
caches are taken as they lie, and both must lie alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from river_compile.kernels.portable import attention_of_several
from river_compile.kernels.triton import launch
from river_compile.kernels.triton.decode_attention import DecodeAttentionSpec
from river_compile.kernels.triton.devices import device_of
from river_compile.kernels.triton.kv_fill import KvFillSpec
from river_compile.kernels.triton.linear import MAX_EXACT_ROWS
from river_compile.kernels.triton.loader import dtype_name
from river_compile.kernels.triton.tiles import attention_splits

# What describes a call that fills slots, its buffers but for the query, and the query, which is empty.
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
) -> Tensor:
    """Splits q|k|v, transforms the heads, writes a slot of the caches for each position and returns the query.

    Args:
        qkv: ``[B, (H + 2 J) D]``, or any leading shape of B elements; of several positions ``[B, T, (H + 2 J) D]``.
        q_norm, k_norm: ``[D]`` weights of the heads' norm, or None.
        cos, sin: ``[..., R]`` with T or B T rows, as Hugging Face models give them; None for no rotary embedding.
        slot: int32 or int64, one element for each position: the slot to write. Outside of 0..S - 1 nothing is written.
        k_cache, v_cache: ``[B, J, S, D]`` in qkv.dtype, features contiguous. Mutated.
        norm: "rms" or "rms_plus_one" where q_norm and k_norm are given, else "none".
        eps: of the norm.
        interleaved: whether rotated pairs are neighbours instead of R / 2 apart.

    Returns:
        The query ``[B, H, D]`` in qkv.dtype, of several positions ``[B, T, H, D]``.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together.
    """
    several = qkv.dim() == 3 and qkv.shape[1] > 1
    how = (norm, eps, interleaved)
    made = _filling(qkv, q_norm, k_norm, cos, sin, slot, k_cache, v_cache, *how, several=several)
    q = _fill(made, (*how, False, several))
    return q.unflatten(0, qkv.shape[:2]) if several else q


def _fill(made: _Filling, how: tuple[object, ...]) -> Tensor:
    """Fills the slots of a call, which depends on `how` beside its tensors, and returns the query ``[B T, H, D]``."""
    describe, given, q = made
    given["q"] = q
    positions = len(q) // len(given["k_cache"])
    launch.chosen(("kv_fill", *how), given, positions, describe)(given)
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
) -> Tensor:
    """Does what `kv_fill` and then attention do, and may count the tokens.

    Of one position that is one launch. With `several` it is two, for any number of positions, and a position has the
    same bits whichever others stand beside it, one alone too; in passes of more than `MAX_EXACT_ROWS` of all sequences
    PyTorch attends.

    Args:
        qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, norm, eps, interleaved: as of `kv_fill`; with `several`
            ``[B, T, (H + 2 J) D]``.
        slot: the slot to write, as of `kv_fill`; None where `counter` is given.
        counter: int32 or int64, one element: the slot to write, or the first of them, to which T is added afterwards;
            or None. Mutated.
        mask, scale, softcap: as of `decode_attention`; the mask says of the new slots too whether they take part. With
            `several` ``[B or 1, 1, T, S]``.
        several: whether positions are a dimension of their own.
        causal: with `several`, position t sees slots 0 to t, without a mask.

    Returns:
        ``[B, H, D]`` in qkv.dtype; with `several` ``[B, T, H, D]``.

    Raises:
        ValueError: tensors whose shapes, strides or dtypes do not fit together, or not one of slot and counter.
    """
    place = slot if counter is None else counter
    if place is None or (slot is not None and counter is not None):
        raise ValueError("give a slot or a counter, which is one that advances")
    how, advance = (norm, eps, interleaved), counter is not None
    if several:
        fills = (qkv, q_norm, k_norm, cos, sin, place, k_cache, v_cache)
        q = _fill(_filling(*fills, *how, counts=advance, several=True), (*how, advance, True))
        heads = q.unflatten(0, qkv.shape[:2])
        return _attend_from_several(heads, k_cache, v_cache, mask, scale, softcap, counter, causal)
    fill, given, out = _filling(qkv, q_norm, k_norm, cos, sin, place, k_cache, v_cache, *how)

    def describe() -> DecodeAttentionSpec:
        return _attention(out, k_cache, v_cache, mask, scale, softcap, fill=fill(), advance=advance)

    given |= launch.present(mask=None if mask is None else mask.contiguous()) | {"out": out}
    launch.chosen(("attend", *how, scale, softcap, advance), given, 1, describe)(given)
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
) -> Tensor:
    """Attends from q ``[B, T, H, D]`` to filled slots, in a launch that counts the tokens."""
    b, positions = q.shape[:2]
    if b * positions > MAX_EXACT_ROWS:
        if counter is not None:
            counter.add_(positions)
        if softcap:
            return attention_of_several(q, k_cache, v_cache, mask, scale, softcap, causal)
        heads = (q.transpose(1, 2), k_cache, v_cache, mask)
        attended = F.scaled_dot_product_attention(*heads, is_causal=causal, scale=scale, enable_gqa=True)
        return attended.transpose(1, 2).contiguous()
    out = q.new_empty((b * positions, *q.shape[2:]))
    slot = None if counter is None else counter.reshape(-1)
    rows = None if mask is None else mask.flatten(0, 1).contiguous()
    if causal:
        rows = torch.ones(1, positions, k_cache.shape[2], dtype=torch.bool, device=q.device).tril()
    given = {"q": q.flatten(0, 1), "k_cache": k_cache, "v_cache": v_cache, "out": out}
    given |= launch.present(slot=slot, mask=rows)

    def describe() -> DecodeAttentionSpec:
        how: dict[str, Any] = {"positions": None, "mask_rows": 0 if rows is None else len(rows)}
        if slot is not None:
            how |= {"advance": True, "index_dtype": dtype_name(slot)}
        return _attention(out, k_cache, v_cache, rows, scale, softcap, **how)

    launch.chosen(("attend from several", scale, softcap), given, positions, describe)(given)
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
    counts: bool = False,
    several: bool = False,
) -> _Filling:
    """Returns what describes a call that fills slots, its buffers but for the result, and an empty ``[B T, H, D]``."""
    b, kv_heads, slots, d = k_cache.shape
    heads = qkv.shape[-1] // d - 2 * kv_heads
    positions = qkv.shape[1] if several else 1
    if qkv.numel() != b * positions * (heads + 2 * kv_heads) * d or heads < 1:
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
    given = {"qkv": qkv.reshape(b * positions, -1, d).contiguous(), "slot": slot.reshape(-1), **others, **tables}
    given |= {"k_cache": k_cache, "v_cache": v_cache}

    def describe() -> KvFillSpec:
        strides, index = _cache_strides(k_cache, v_cache), dtype_name(slot)
        how: dict[str, Any] = {"head_norm": norm, "eps": eps, "cache_strides": strides, "index_dtype": index}
        if tables:
            lines, features = tables["cos"].shape
            rows = {"rotary_rows": lines // positions}
            how |= {"rotary_dim": features, "rotary_dtype": dtype_name(tables["cos"]), **rows}
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
    **others: Any,
) -> DecodeAttentionSpec:
    (_, heads, d), (b, kv_heads, slots, _) = out.shape, k_cache.shape
    # From open positions as if a sequence were alone, so that its bits do not depend on the others either.
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
        splits=attention_splits(sequences * kv_heads, slots, d, device_of(out)),
        cache_strides=_cache_strides(k_cache, v_cache),
        **others,
    )


def _cache_strides(k_cache: Tensor, v_cache: Tensor) -> tuple[int, ...]:
    """Returns the strides of sequence, head and slot that both caches share, empty for contiguous ones."""
    if k_cache.shape != v_cache.shape or k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(
            "the caches must have one shape and stride with contiguous features; these have "
            f"{tuple(k_cache.shape)}, {k_cache.stride()} and {tuple(v_cache.shape)}, {v_cache.stride()}"
        )
    return () if k_cache.is_contiguous() else k_cache.stride()[:3]
