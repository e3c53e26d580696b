"""The fusion rules around the KV cache: the write of one slot, and attention over a static cache.

The slot stays a device tensor. Not handled: several positions per row, caches that grow with every token.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import fx

from river_compile.passes.edits import Missed, call, drop_unused, put, reshaped
from river_compile.passes.nodes import (
    before_cast,
    before_views,
    closure,
    is_tensor,
    mutated_inputs,
    same_dtype,
    shape,
    value_of,
)

from .block import BlockView, CacheEntry
from .match import Columns, columns
from .recognise import Attention, Normed, Rotation, norm, rotation

_MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Heads:
    """Query, key or value heads `node`: columns of a product, perhaps normalised, perhaps rotated."""

    node: fx.Node
    columns: Columns
    norm: Normed | None
    rotation: Rotation | None


def _heads(node: fx.Node) -> _Heads | None:
    inner = before_views(node)
    turned = rotation(inner)
    inner = inner if turned is None else before_views(turned.x)
    normed = norm(inner)
    found = columns(before_cast(inner) if normed is None else normed.x)
    return None if found is None else _Heads(node, found, normed, turned)


def fuse_kv_fill(view: BlockView) -> fx.Node:
    """rope + kv write."""
    _, attended = _attention(view)
    k_entry, v_entry = _entries(view, attended)
    k, v = (_heads(entry.value) for entry in (k_entry, v_entry))
    if k is None:
        raise Missed("the key is no range of columns with a known qk-norm and rotation", before_views(k_entry.value))
    if v is None or v.norm or v.rotation:
        raise Missed("the value is no plain range of columns", before_views(v_entry.value))
    q = _query(attended.q, k)
    last = max(node for entry in (k_entry, v_entry) for node in (entry.writer, entry.moved) if node is not None)
    moved = _users_before(q.node, last)
    _check_heads(q, k, v, k_entry.cache)
    _check_reads((k_entry, v_entry), last)
    fused = _write(view.graph, (q, k, v), (k_entry, v_entry), last, moved)
    for entry in (k_entry, v_entry):
        view.entries[entry.cache] = replace(entry, value=k.columns.product, writer=fused, moved=None)
    return fused


def _attention(view: BlockView) -> tuple[fx.Node, Attention]:
    if view.grown:
        raise Missed("the cache grows with every token", view.grown[0])
    found = view.attention()
    if found is None:
        raise Missed("no attention over a static cache was recognised")
    return found


def _entries(view: BlockView, attended: Attention) -> tuple[CacheEntry, CacheEntry]:
    k, v = view.entries[attended.k], view.entries[attended.v]
    if k.slot != v.slot:
        raise Missed("keys and values go to different slots", v.writer)
    if isinstance(k.slot, fx.Node) and shape(k.slot) != (1,):
        raise Missed("more than one slot is written", k.writer)
    for entry in (k, v):
        _fixed_sizes(entry.cache)
    return k, v


def _fixed_sizes(cache: fx.Node) -> tuple[int, int]:
    """Returns a cache's heads and features; where Dynamo traced them as dynamic, a guard of the whole graph fixes them.

    They differ from model to model alone. The number of slots differs from cache to cache and stays dynamic.
    """
    _, heads, _, features = value_of(cache).shape
    return int(heads), int(features)


def _query(node: fx.Node, k: _Heads) -> _Heads:
    """Returns the query heads: the value nearest to attention that comes from the keys' product in a known way."""
    inputs = [node]
    while inputs and inputs[0].op != "placeholder":
        found = _heads(inputs[0])
        if found is not None and found.columns.product is k.columns.product:
            return found
        inputs = [n for n in before_views(inputs[0]).all_input_nodes if is_tensor(n) and value_of(n).dim() >= 3]
    raise Missed("the query does not come from the keys' product in a known way", node)


def _check_heads(q: _Heads, k: _Heads, v: _Heads, cache: fx.Node) -> None:
    kv_heads, dim = _fixed_sizes(cache)
    product, width = k.columns.product, kv_heads * dim
    expected = (q.columns.start, *(q.columns.stop + n for n in (0, 0, width, width, 2 * width)))
    found = tuple(n for heads in (q, k, v) for n in (heads.columns.start, heads.columns.stop))
    if v.columns.product is not product or found != expected or (found[1] - found[0]) % width:
        sizes = shape(cache)
        raise Missed(f"q, k and v are not columns side by side of one product, heads of a cache {sizes}", product)
    if not same_dtype(cache, product):
        raise Missed(f"the cache holds {value_of(cache).dtype}, the product {value_of(product).dtype}", cache)
    rotations = [h.rotation and (h.rotation.cos, h.rotation.sin, h.rotation.interleaved) for h in (q, k)]
    if rotations[0] != rotations[1]:
        raise Missed("q and k are rotated differently", q.node)
    norms = [h.norm and (h.norm.kind, h.norm.eps, shape(h.norm.weight)) for h in (q, k)]
    if norms[0] != norms[1] or (k.norm and (k.norm.kind == "layer" or shape(k.norm.weight) != (dim,))):
        raise Missed("the norms of q and k are not one RMSNorm per head", q.node)


def _users_before(node: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Returns what depends on a value and stands before a node, in order: it must move after that node."""
    changed = {m for n in node.graph.nodes if n < last for m in mutated_inputs(n)}
    early = sorted(closure([node], lambda n: (user for user in n.users if user < last)) - {node})
    bad = next((user for user in early if mutated_inputs(user) or changed & set(user.all_input_nodes)), None)
    if bad is not None:
        raise Missed("the query meets a value that changes before the cache is written", bad)
    return early


def _check_reads(entries: tuple[CacheEntry, CacheEntry], last: fx.Node) -> None:
    for entry in entries:
        own = {entry.writer} if entry.moved is None else {entry.moved, *entry.moved.all_input_nodes}
        early = next((user for user in entry.cache.users if user < last and user not in own), None)
        if early is not None:
            raise Missed("the cache is read before it is written", early)


def _write(
    graph: fx.Graph,
    heads: tuple[_Heads, _Heads, _Heads],
    entries: tuple[CacheEntry, CacheEntry],
    last: fx.Node,
    moved: list[fx.Node],
) -> fx.Node:
    q, k, v = heads
    product, batch, (_, dim) = k.columns.product, value_of(entries[0].cache).shape[0], _fixed_sizes(entries[0].cache)
    query_heads = (k.columns.start - q.columns.start) // dim
    weights = (q.norm and q.norm.weight, k.norm and k.norm.weight)
    tables = (None, None) if k.rotation is None else (k.rotation.cos, k.rotation.sin)
    how = ("none", 0.0) if k.norm is None else (k.norm.kind, k.norm.eps)
    following = last.next
    with graph.inserting_before(following):
        start, stop = q.columns.start, v.columns.stop
        qkv = product
        if (start, stop) != (0, shape(product)[-1]):
            qkv_value = value_of(product)[..., start:stop]
            qkv = call(graph, operator.getitem, (product, (Ellipsis, slice(start, stop))), qkv_value, product)
        caches = [entry.cache for entry in entries]
        arguments = (qkv, *weights, *tables, _slot(graph, entries[0]), *caches, *how)
        arguments += (k.rotation is not None and k.rotation.interleaved,)
        value = value_of(product).new_empty((batch, query_heads, dim))
        fused = call(graph, torch.ops.river.kv_fill.default, arguments, value, product)
        query = reshaped(graph, fused, q.node)
    for node in moved:
        following.prepend(node)
    q.node.replace_all_uses_with(query)
    drop_unused(graph, q.node)
    for entry in entries:
        entry.writer.replace_all_uses_with(entry.cache)
        drop_unused(graph, entry.writer)
    return fused


def _slot(graph: fx.Graph, entry: CacheEntry) -> fx.Node:
    """Returns the slot that is written, as a tensor of one number on the cache's device."""
    if isinstance(entry.slot, fx.Node):
        return entry.slot
    like = value_of(entry.cache)
    value = like.new_empty((1,), dtype=torch.int64)
    return call(graph, torch.full, ((1,), entry.slot), value, entry.cache, dtype=torch.int64, device=like.device)


def fuse_attention(view: BlockView) -> fx.Node:
    """attention."""
    node, found = _attention(view)
    if any(n is not None and n > node for e in view.entries.values() for n in (e.writer, e.moved)):
        raise Missed("the cache is read before it is written", node)
    q, cache = value_of(found.q), value_of(found.k)
    if q.dtype != cache.dtype or shape(found.v) != shape(found.k):
        raise Missed(f"q is {q.dtype}, the caches are {cache.dtype} {shape(found.k)} and {shape(found.v)}", node)
    _check_sizes(node, found)
    graph = view.graph
    with graph.inserting_before(node):
        query = call(graph, torch.squeeze, (found.q, 2), q.squeeze(2), found.q)
        arguments = (query, found.k, found.v, _mask(graph, found), found.scale, found.softcap)
    return put(graph, torch.ops.river.decode_attention.default, arguments, value_of(query), node)


def _check_sizes(node: fx.Node, found: Attention) -> None:
    if not all(isinstance(n, int) for n in shape(found.q)[1:]) or shape(found.q)[2] != 1:
        raise Missed(f"the query has shape {shape(found.q)}, not one position of fixed heads", node)
    if found.mask is None:
        return
    batch, _, slots, _ = shape(found.k)
    if shape(found.mask) not in ((batch, 1, 1, slots), (1, 1, 1, slots)):
        raise Missed(f"its mask has shape {shape(found.mask)}, not one row of slots for each sequence", found.mask)
    if value_of(found.mask).dtype not in _MASKS:
        raise Missed(f"its mask is of dtype {value_of(found.mask).dtype}", found.mask)
    if shape(found.mask)[0] != batch and not isinstance(batch, int):
        raise Missed("one mask for a dynamic number of sequences", node)


def _mask(graph: fx.Graph, found: Attention) -> fx.Node | None:
    """Returns the mask as ``[B, S]``."""
    mask, (batch, _, slots, _) = found.mask, value_of(found.k).shape
    if mask is None:
        return None
    if shape(mask)[0] != shape(found.k)[0]:
        sizes = (batch, -1, -1, -1)
        mask = call(graph, torch.Tensor.expand, (mask, sizes), value_of(mask).expand(sizes), mask)
    return call(graph, torch.flatten, (mask, 1), value_of(mask).new_empty((batch, slots)), mask)
