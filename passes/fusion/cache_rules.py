"""Fusion rules around a static KV cache: the write of its slots, and attention over it.

A GPU runs both as one operator that also counts tokens; on a CPU they stay apart, as phases of one tape.
Not handled: dynamic caches; caches of full sliding windows, whose entries move.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from river_compile.kernels import cache_ops  # noqa: F401  (registers the operators)
from river_compile.passes.edits import NoMatch, call, drop_unused, replace_node, require, reshape_like
from river_compile.passes.fusion.match import BlockView, CacheEntry, Columns, columns
from river_compile.passes.fusion.recognise import Attention, Normed, Rotation, attention, norm, rotation
from river_compile.passes.nodes import (
    called,
    closure,
    either_way,
    is_tensor,
    memory_of,
    mutated_inputs,
    only_used_for,
    rank,
    shape,
    skip_casts,
    skip_views,
    value_of,
)

_MASKS = (torch.bool, torch.float32, torch.bfloat16, torch.float16)


def fuse_kv_fill(view: BlockView) -> fx.Node:
    """rope + kv write."""
    _, attended = _cached_attention(view)
    entries = k_entry, v_entry = view.entries[attended.k], view.entries[attended.v]
    require(k_entry.slot == v_entry.slot, "keys and values go to different slots", v_entry.writer)
    slots = shape(k_entry.slot)
    require(slots == (1,) or view.multi_position, "more than one slot is written", k_entry.writer)
    require(slots == (_positions(k_entry.value),), "its entries do not go to one slot each", k_entry.writer)
    k, v = (_heads(entry.value) for entry in entries)
    if k is None:
        raise NoMatch(
            "the key is not a range of columns with a supported qk-norm and rotation", skip_views(k_entry.value)
        )
    if v is None or v.norm or v.rotation:
        raise NoMatch("the value is not a range of columns", skip_views(v_entry.value))
    q = _query(attended.q, k)
    last = max(entry.writer for entry in entries)
    moved = _users_before(q.node, last)
    _check_heads(q, k, v, entries)
    _check_reads(entries, last)
    fused = _write((q, k, v), entries, last, moved)
    for entry in entries:
        view.entries[entry.cache] = replace(entry, value=k.columns.matmul, writer=fused)
    return fused


def fuse_attention(view: BlockView) -> fx.Node:
    """attention."""
    node, found = _cached_attention(view)
    late = any(entry.writer > node for entry in view.entries.values())
    require(not late, "the cache is read before it is written", node)
    q, keys, values = (value_of(n) for n in (found.q, found.k, found.v))
    alike = q.dtype == keys.dtype == values.dtype and _same_sizes(keys, values)
    caches = " and ".join(f"{cache.dtype} {shape(n)}" for cache, n in ((keys, found.k), (values, found.v)))
    require(alike, f"q is {q.dtype}, the caches are {caches}", node)
    _, heads, positions, features = shape(found.q)
    fixed = isinstance(heads, int) and isinstance(features, int)
    require(fixed, f"the query has shape {shape(found.q)}, whose heads are not fixed", node)
    if view.multi_position and not view.native:
        return _fuse_any_width(view, node, found)
    if positions == 1 and not found.causal:
        with view.graph.inserting_before(node):
            mask = _mask(found, node)
            query = call(torch.squeeze, (found.q, 2), q.squeeze(2), found.q)
            arguments = (query, found.k, found.v, mask, found.scale, found.softcap, *_sinks(found))
        fused = replace_node(torch.ops.river.decode_attention.default, arguments, value_of(query), node)
        return fused if view.native else fuse_write(fused)
    require(view.native, f"the query has shape {shape(found.q)}, not one position of fixed heads", node)
    with view.graph.inserting_before(node):
        query = _transpose(found.q)
        how = (_mask_of_several(found), found.scale, found.softcap, found.causal)
        given = (query, found.k, found.v, *how, *_sinks(found))
        fused = call(torch.ops.river.attention.default, given, torch.empty_like(value_of(query).contiguous()), node)
        result = _transpose(fused)
    node.replace_all_uses_with(result)
    drop_unused(node)
    return fused


def _sinks(found: Attention) -> tuple[fx.Node, ...]:
    """Return the operators' last argument if there are sinks."""
    return () if found.sinks is None else (found.sinks,)


def fuse_write(attention: fx.Node) -> fx.Node:
    """Fuse one-position attention with the write before it, if nothing is between; return the attention's node."""
    query, *caches, mask, scale, softcap = attention.args[:6]
    write, sinks = skip_views(query), attention.args[6:]
    if not _directly_precedes(write, attention, caches):
        return attention
    with attention.graph.inserting_before(attention):
        how = (mask, scale, softcap, False, False, *(sinks or (None,)))  # one position
        fused, step = _attend(write, caches, how, value_of(attention))
    attention.replace_all_uses_with(fused)
    for node in filter(None, (attention, write, step)):
        drop_unused(node)
    return fused


@dataclass(frozen=True)
class _Heads:
    """Query, key or value heads: columns of a matmul, perhaps normalized and rotated."""

    node: fx.Node  # [B, H, T, D], or a query before that reshape, [B, T, H D]
    columns: Columns
    norm: Normed | None
    rotation: Rotation | None


def _heads(node: fx.Node) -> _Heads | None:
    transposes: list[fx.Node] = []
    inner = _skip_transpose(node, transposes)
    rotated = rotation(inner)
    inner = inner if rotated is None else _skip_transpose(rotated.x, transposes)
    normed = norm(inner)
    found = columns(skip_casts(inner) if normed is None else _skip_transpose(normed.x, transposes))
    if found is None or (_positions(node) != 1 and not _keeps_positions(node, transposes, found.matmul)):
        return None
    return _Heads(node, found, normed, rotated)


def _positions(heads: fx.Node) -> int | str:
    return shape(heads)[2 if rank(heads) == 4 else 1]


def _skip_transpose(node: fx.Node, transposes: list[fx.Node]) -> fx.Node:
    """Skip views and one transpose of positions and heads, which is appended to `transposes`."""
    node = skip_views(node)
    swapped = called(node, torch.transpose) and {d % 4 for d in node.args[1:]} == {1, 2}
    if rank(node) == 4 and (swapped or (called(node, torch.permute) and tuple(node.args[1]) == (0, 2, 1, 3))):
        transposes.append(node)
        return skip_views(node.args[0])
    return node


def _keeps_positions(node: fx.Node, transposes: list[fx.Node], matmul: fx.Node) -> bool:
    """Whether ``[B, T, H, D]`` became ``[B, H, T, D]`` at most once; of one head, both have the same order."""
    if not transposes and rank(node) == 4 and shape(node)[1] == 1:
        return rank(matmul) == 3 and (shape(node)[0], shape(node)[2]) == shape(matmul)[:2]
    places = [transpose.args[0] for transpose in transposes] if rank(node) == 4 else [node, *transposes]
    return len(places) == 1 and rank(matmul) == 3 and shape(places[0])[:2] == shape(matmul)[:2]


def _cached_attention(view: BlockView) -> tuple[fx.Node, Attention]:
    """Return the attention over the static cache and its node, else raises `NoMatch`."""
    if view.grown:
        raise NoMatch("the cache grows with every token", view.grown[0])
    for node in view.graph.nodes:
        found = attention(node)
        if found is not None and found.k in view.entries and found.v in view.entries:
            return node, found
    raise NoMatch("no attention over a static cache was recognized")


def _fixed_sizes(cache: fx.Node) -> tuple[int, int]:
    """Return a cache's heads and features. A guard fixes them if dynamic, since they vary with the model only."""
    _, heads, _, features = value_of(cache).shape
    return int(heads), int(features)


def _query(node: fx.Node, k: _Heads) -> _Heads:
    """Return the query heads: the value nearest to attention that `_heads` finds in the keys' matmul."""
    inputs = [node]
    while inputs and inputs[0].op != "placeholder":
        found = _heads(inputs[0])
        if found is not None and found.columns.matmul is k.columns.matmul:
            return found
        inputs = [n for n in skip_views(inputs[0]).all_input_nodes if is_tensor(n) and value_of(n).dim() >= 3]
    raise NoMatch("the query is not a supported function of the keys' matmul", node)


def _check_heads(q: _Heads, k: _Heads, v: _Heads, entries: tuple[CacheEntry, CacheEntry]) -> None:
    cache = entries[0].cache
    (kv_heads, dim), _ = (_fixed_sizes(entry.cache) for entry in entries)
    matmul, width = k.columns.matmul, kv_heads * dim
    expected = (q.columns.start, *(q.columns.stop + n for n in (0, 0, width, width, 2 * width)))
    found = tuple(n for heads in (q, k, v) for n in (heads.columns.start, heads.columns.stop))
    adjacent = v.columns.matmul is matmul and found == expected and (found[1] - found[0]) % width == 0
    sizes, given = shape(cache), value_of(matmul).dtype
    held = [value_of(entry.cache).dtype for entry in entries]
    require(adjacent, f"q, k and v are not adjacent columns of one matmul for a cache {sizes}", matmul)
    require(held == [given, given], f"the caches hold {held[0]} and {held[1]}, the matmul {given}", cache)
    rotations = [
        h.rotation and (h.rotation.cos, h.rotation.sin, h.rotation.interleaved, h.rotation.half_tables) for h in (q, k)
    ]
    require(rotations[0] == rotations[1], "q and k are rotated differently", q.node)
    norms = [h.norm and (h.norm.kind, h.norm.eps, shape(h.norm.weight)) for h in (q, k)]
    per_head = k.norm is None or (k.norm.kind != "layer" and shape(k.norm.weight) == (dim,))
    require(norms[0] == norms[1] and per_head, "the norms of q and k are not one RMSNorm per head", q.node)


def _users_before(node: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Return all users of a value before `last`, in order; they have to move after it."""
    changed = {m for n in node.graph.nodes if n < last for m in mutated_inputs(n)}
    early = sorted(closure([node], lambda n: (user for user in n.users if user < last)) - {node})
    bad = next((user for user in early if mutated_inputs(user) or changed & set(user.all_input_nodes)), None)
    require(bad is None, "the query depends on a value that changes before the cache is written", bad)
    return early


def _check_reads(entries: tuple[CacheEntry, CacheEntry], last: fx.Node) -> None:
    for entry in entries:
        early = next((user for user in entry.cache.users if user < last and user is not entry.writer), None)
        require(early is None, "the cache is read before it is written", early)


def _write(
    heads: tuple[_Heads, _Heads, _Heads],
    entries: tuple[CacheEntry, CacheEntry],
    last: fx.Node,
    moved: list[fx.Node],
) -> fx.Node:
    q, k, v = heads
    matmul, batch, (_, dim) = k.columns.matmul, value_of(entries[0].cache).shape[0], _fixed_sizes(entries[0].cache)
    query_heads = (k.columns.start - q.columns.start) // dim
    weights = (q.norm and q.norm.weight, k.norm and k.norm.weight)
    tables = (None, None) if k.rotation is None else (k.rotation.cos, k.rotation.sin)
    how = ("none", 0.0) if k.norm is None else (k.norm.kind, k.norm.eps)
    following = last.next
    with following.graph.inserting_before(following):
        start, stop = q.columns.start, v.columns.stop
        qkv = matmul
        if (start, stop) != (0, shape(matmul)[-1]):
            qkv_value = value_of(matmul)[..., start:stop]
            qkv = call(operator.getitem, (matmul, (Ellipsis, slice(start, stop))), qkv_value, matmul)
        caches = [entry.cache for entry in entries]
        arguments = (qkv, *weights, *tables, entries[0].slot, *caches, *how)
        arguments += (k.rotation is not None and k.rotation.interleaved,)
        arguments += (k.rotation is not None and k.rotation.half_tables,)
        several = _positions(q.node) != 1
        positions = value_of(entries[0].value).shape[2]
        sizes = (batch, positions, query_heads, dim) if several else (batch, query_heads, dim)
        fused = call(torch.ops.river.kv_fill.default, arguments, value_of(matmul).new_empty(sizes), matmul)
        query = _transpose(fused) if several and rank(q.node) == 4 else reshape_like(fused, q.node)
    for node in moved:
        following.prepend(node)
    q.node.replace_all_uses_with(query)
    drop_unused(q.node)
    for entry in entries:
        entry.writer.replace_all_uses_with(entry.cache)
        drop_unused(entry.writer)
    return fused


def _transpose(node: fx.Node) -> fx.Node:
    return call(torch.transpose, (node, 1, 2), value_of(node).transpose(1, 2), node)


def _fuse_any_width(view: BlockView, node: fx.Node, found: Attention) -> fx.Node:
    """Fuse attention of any number of positions with the write before it."""
    write, caches = _skip_transpose(found.q, []), [found.k, found.v]
    require(_directly_precedes(write, node, caches), "its query and slots are not computed right before it", node)
    matmul = write.args[0]
    rows = rank(matmul) == 3 and shape(matmul)[:2] == (shape(found.q)[0], _positions(found.q))
    require(rows, f"its matmul has shape {shape(matmul)}", node)
    value = value_of(found.q)
    with view.graph.inserting_before(node):
        how = (_mask_of_several(found), found.scale, found.softcap, True, found.causal, found.sinks)
        fused, step = _attend(write, caches, how, torch.empty_like(value.transpose(1, 2).contiguous()))
        result = _transpose(fused)
    node.replace_all_uses_with(result)
    for old in filter(None, (node, write, step)):
        drop_unused(old)
    return fused


def _directly_precedes(write: fx.Node, attention: fx.Node, caches: list[fx.Node]) -> bool:
    """Whether a node writes an attention's caches and makes its query, and nothing between conflicts."""
    if not called(write, torch.ops.river.kv_fill.default) or not only_used_for(write, attention):
        return False
    between = [n for n in attention.graph.nodes if write < n < attention and not only_used_for(n, attention)]
    changed = {memory_of(m) for n in between for m in mutated_inputs(n)}
    read = {n for between_node in between for n in between_node.all_input_nodes}
    alone = not changed & {memory_of(n) for n in write.all_input_nodes} and not read & set(caches)
    return alone and list(write.args[6:8]) == caches


def _attend(write: fx.Node, caches: list[fx.Node], how: tuple, value: Tensor) -> tuple[fx.Node, fx.Node | None]:
    """Add the operator of write and attention; return it and the counter's update that it replaces, if any."""
    *made_of, slot, _, _, norm, eps, interleaved, half_tables = write.args
    step = _counter_update(slot, write)
    where = (slot, None) if step is None else (None, step.args[0])
    arguments = (*made_of, *where, *caches, norm, eps, interleaved, *how, half_tables)
    return call(torch.ops.river.attend.default, arguments, value, write), step


def _counter_update(slot: fx.Node, write: fx.Node) -> fx.Node | None:
    """Return the node that advances the counter if slots are ``counter + arange(n)`` and nothing else reads it."""
    inner = skip_views(slot)
    for zero, counter in either_way(inner, operator.add):
        if not (called(zero, torch.arange) and is_tensor(counter) and shape(zero) == shape(inner)):
            continue
        count = zero.args[min(1, len(zero.args) - 1)]
        first = zero.args in ((count,), (0, count), (0, count, 1))
        steps = [n for n in counter.users if _advances(n, counter, count)] if first else []
        if len(steps) == 1 and not steps[0].users and set(counter.users) == {inner, steps[0]} and inner < steps[0]:
            alone = only_used_for(inner, write) and value_of(slot).dtype == value_of(counter).dtype
            return steps[0] if alone else None
    return None


def _advances(node: fx.Node, counter: fx.Node, by: Argument) -> bool:
    """Whether a node adds `by` in place to a counter, a scalar tensor among the inputs."""
    adds = called(node, torch.Tensor.add_) and node.args == (counter, by) and isinstance(by, (int, fx.Node))
    return adds and not node.kwargs and counter.op == "placeholder" and rank(counter) == 0


def _same_sizes(keys: Tensor, values: Tensor) -> bool:
    """Compare sizes, of which Dynamo may have traced one cache's as dynamic; equality becomes a guard."""
    return all(bool(a == b) for a, b in zip(keys.shape, values.shape, strict=True))


def _mask_of_several(found: Attention) -> fx.Node | None:
    """Return the mask of several positions, ``[B or 1, 1, T, S]``."""
    mask, batch = found.mask, shape(found.k)[0]
    if mask is None:
        return None
    sizes, dtype = shape(mask), value_of(mask).dtype
    one_each = len(sizes) == 4 and sizes[0] in (1, batch) and sizes[1:3] == (1, _positions(found.q))
    one_each = one_each and bool(value_of(mask).shape[3] == value_of(found.k).shape[2])
    require(one_each, f"its mask has shape {sizes}, not a row of slots for each position", mask)
    require(dtype in _MASKS, f"its mask is of dtype {dtype}", mask)
    return mask


def _mask(found: Attention, node: fx.Node) -> fx.Node | None:
    """Return the mask as ``[B, S]``."""
    mask, batch = found.mask, shape(found.k)[0]
    if mask is None:
        return None
    sizes, dtype = shape(mask), value_of(mask).dtype
    one_row = len(sizes) == 4 and sizes[:3] in ((batch, 1, 1), (1, 1, 1))
    one_row = one_row and bool(value_of(mask).shape[3] == value_of(found.k).shape[2])
    require(one_row, f"its mask has shape {sizes}, not one row of slots for each sequence", mask)
    require(dtype in _MASKS, f"its mask is of dtype {dtype}", mask)
    if sizes[0] != batch:
        require(isinstance(batch, int), "one mask for a dynamic number of sequences", node)
        mask = call(torch.Tensor.expand, (mask, (batch, -1, -1, -1)), value_of(mask).expand(batch, -1, -1, -1), mask)
    return call(torch.flatten, (mask, 1), value_of(mask)[:, 0, 0], mask)
