"""The operators ``torch.ops.river.*`` on a static KV cache: what each computes, in plain torch, on any device.

Importing this module registers them; :mod:`river_compile.kernels.triton.operators` registers generated kernels.
Shapes: B sequences, T positions, H query heads, J key-value heads, S slots, D features of a head, R rotated ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.portable import cache_attention, normalized


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
    """Split q|k|v, transform the heads, write a slot of the caches for each position and return the query.

    Args:
        qkv: ``[B, (H + 2 J) D]``, or any leading shape of B elements; for several positions ``[B, T, (H + 2 J) D]``.
        q_norm, k_norm: ``[D]`` weights of the heads' norm, or None.
        cos, sin: ``[..., R]`` with T or B T rows, as in Hugging Face models; None for no rotary embedding.
        slot: int32 or int64, the slot to write for each position. Outside of 0..S - 1 nothing is written.
        k_cache, v_cache: ``[B, J, S, D]`` in qkv.dtype, features contiguous. Mutated.
        norm: "rms" or "rms_plus_one" with q_norm and k_norm, else "none".
        eps: of the norm.
        interleaved: whether rotated pairs are neighbors instead of R / 2 apart.
        half_tables: cos and sin are ``[..., R / 2]``, with one angle for each pair.

    Returns:
        The query ``[B, H, D]`` in qkv.dtype, for several positions ``[B, T, H, D]``.

    Raises:
        ValueError: inconsistent shapes, strides or dtypes.
    """
    several = qkv.dim() == 3 and qkv.shape[1] > 1
    heads = _heads(qkv, k_cache, several)
    how = (norm, eps, interleaved, half_tables)
    q = _fill(heads, q_norm, k_norm, cos, sin, slot.reshape(-1), k_cache, v_cache, *how)
    return q if several else q[:, 0].contiguous()


def _heads(qkv: Tensor, k_cache: Tensor, several: bool) -> Tensor:
    """Return q|k|v as ``[B, T, H + 2 J, D]``."""
    b, _, _, d = k_cache.shape
    return qkv.reshape(b, qkv.shape[1] if several else 1, -1, d)


def _fill(
    qkv_BTHD: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slots_T: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    norm: str,
    eps: float,
    interleaved: bool,
    half_tables: bool,
) -> Tensor:
    """Write keys and values to their slots and return the query ``[B, T, H, D]``."""
    kv_heads, slots = k_cache.shape[1:3]
    q, k, v = qkv_BTHD.split([qkv_BTHD.shape[2] - 2 * kv_heads, kv_heads, kv_heads], dim=2)
    if half_tables:
        cos, sin = (_whole_table(table, interleaved) for table in (cos, sin))
    q, k = (_turned(x, w, cos, sin, norm, eps, interleaved) for x, w in ((q, q_norm), (k, k_norm)))
    there = (slots_T >= 0) & (slots_T < slots)
    for cache, entries in ((k_cache, k), (v_cache, v)):
        cache[:, :, slots_T[there].long()] = entries.transpose(1, 2)[:, :, there]
    return q.contiguous()


def _whole_table(table: Tensor | None, interleaved: bool) -> Tensor | None:
    """Return ``[..., R]`` of a rotation's table ``[..., R / 2]`` with one angle for each pair."""
    if table is None:
        return None
    return table.repeat_interleave(2, -1) if interleaved else torch.cat([table, table], -1)


def _turned(
    x_BTHD: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """Return heads after their norm and the rotary embedding (Su et al. 2021), in x's dtype."""
    x = x_BTHD.float()
    if weight is not None:
        x = normalized(x, norm, weight, None, eps)
    if cos is not None and sin is not None:
        r = cos.shape[-1]
        cos, sin = (table.float().reshape(-1, x.shape[1], 1, r) for table in (cos, sin))
        rotated, rest = x[..., :r], x[..., r:]
        if interleaved:
            turned = torch.stack([-rotated[..., 1::2], rotated[..., 0::2]], -1).flatten(-2)
        else:
            turned = torch.cat([-rotated[..., r // 2 :], rotated[..., : r // 2]], -1)
        x = torch.cat([rotated * cos + turned * sin, rest], -1)
    return x.to(x_BTHD.dtype)


KV_FILL = torch.library.custom_op("river::kv_fill", kv_fill, mutates_args=("k_cache", "v_cache"))


@KV_FILL.register_fake
def _(qkv: Tensor, q_norm: Any, k_norm: Any, cos: Any, sin: Any, slot: Any, k_cache: Tensor, *_others: Any) -> Tensor:
    b, kv_heads, _, d = k_cache.shape
    positions = qkv.shape[1:2] if qkv.dim() == 3 and qkv.shape[1] > 1 else ()
    return qkv.new_empty((b, *positions, qkv.shape[-1] // d - 2 * kv_heads, d))


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
    """Run `kv_fill` and then attention, and may advance a token counter.

    Args:
        qkv, q_norm, k_norm, cos, sin, k_cache, v_cache, norm, eps, interleaved, half_tables: as in `kv_fill`; with
            `several` ``[B, T, (H + 2 J) D]``.
        slot: the slot to write, as in `kv_fill`; None with a `counter`.
        counter: int32 or int64, one element: the first slot to write, to which T is added afterwards; or None. Mutated.
        mask, scale, softcap: as in `decode_attention`; the mask covers the new slots too. With `several`
            ``[B or 1, 1, T, S]``.
        several: whether positions are a separate dimension. A position's bits do not depend on the others, up to
            `MAX_EXACT_ROWS` positions of all sequences.
        causal: with `several`, position t attends to slots 0 to t, without a mask.
        sinks: as in `decode_attention`.

    Returns:
        ``[B, H, D]`` in qkv.dtype; with `several` ``[B, T, H, D]``.

    Raises:
        ValueError: inconsistent shapes, strides or dtypes, or not exactly one of slot and counter.
    """
    place = one_place(slot, counter)
    heads = _heads(qkv, k_cache, several)
    positions = heads.shape[1]
    slots = place.reshape(-1)
    if counter is not None:
        slots = slots + torch.arange(positions, device=slots.device)
    q = _fill(heads, q_norm, k_norm, cos, sin, slots, k_cache, v_cache, norm, eps, interleaved, half_tables)
    if counter is not None:
        counter.add_(positions)
    if several:
        return cache_attention(q, k_cache, v_cache, mask, scale, softcap, causal, sinks)
    return decode_attention(q[:, 0], k_cache, v_cache, mask, scale, softcap, sinks)


def one_place(slot: Tensor | None, counter: Tensor | None) -> Tensor:
    """Return the one of both that is given; raise a ValueError for none or both."""
    place = slot if counter is None else counter
    if place is None or (slot is not None and counter is not None):
        raise ValueError("give a slot, or a counter that advances, and not both")
    return place


ATTEND = torch.library.custom_op("river::attend", attend, mutates_args=("counter", "k_cache", "v_cache"))


@ATTEND.register_fake
def _(
    qkv: Tensor, q_norm: Any, k_norm: Any, cos: Any, sin: Any, slot: Any, counter: Any, k_cache: Tensor, *others: Any
) -> Tensor:
    b, kv_heads, _, d = k_cache.shape
    several = len(others) > 7 and others[7]
    positions = qkv.shape[1:2] if several else ()
    return qkv.new_empty((b, *positions, qkv.shape[-1] // d - 2 * kv_heads, d))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from one query position to the slots of a static cache.

    Args:
        q: ``[B, H, D]``.
        k_cache, v_cache: ``[B, J, S, D]`` in q.dtype, features contiguous; J divides H.
        mask: ``[B, S]``: bool, True for slots to attend to, or floating, added to the scores, with at most half of the
            dtype's least number for a masked slot. None for all slots. A fully masked row gives 0.
        scale: of the scores.
        softcap: c in c tanh(score / c); 0 for none.
        sinks: ``[H]`` in any floating dtype: each head's score of one more key, whose value is 0. None for none.

    Returns:
        ``[B, H, D]`` in q.dtype.

    Raises:
        ValueError: inconsistent shapes, strides or dtypes.
    """
    if mask is not None:
        if mask.is_floating_point():
            mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)
        mask = mask[:, None, None]
    return cache_attention(q.unsqueeze(1), k_cache, v_cache, mask, scale, softcap, sinks=sinks).squeeze(1)


DECODE_ATTENTION = torch.library.custom_op("river::decode_attention", decode_attention, mutates_args=())


@torch.library.custom_op("river::attention", mutates_args=())
def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    causal: bool,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend from several query positions to the slots of a static cache.

    Args:
        q: ``[B, T, H, D]``.
        k_cache, v_cache: ``[B, J, S, D]``, H a multiple of J.
        mask: ``[B or 1, 1, T, S]``: bool, True for slots to attend to, or floating, added to the scores. None for all.
        scale: of the scores.
        softcap: c in c tanh(score / c), before the mask; 0 for none.
        causal: position t attends to slots 0 to t, without a mask.
        sinks: as in `decode_attention`.

    Returns:
        ``[B, T, H, D]`` in q's dtype, zeros for a position without slots.
    """
    return cache_attention(q, k_cache, v_cache, mask, scale, softcap, causal, sinks)


@DECODE_ATTENTION.register_fake
@attention.register_fake
def _(q: Tensor, *_others: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)
