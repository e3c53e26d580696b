"""A fusion rule's view of a segment: matmuls by role, writes to KV caches, columns of a matmul's result.

Roles follow from data flow. Not handled: cache writes but to a slot or the end; slices of several dimensions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx
from torch.fx.node import Argument

from river_compile.kernels.quant.layouts import NATIVE_LAYOUT
from river_compile.passes.nodes import called, closure, is_tensor, rank, shape, skip_views, value_of

WHOLE = slice(None, None, None)


class BlockView:
    """One segment: its writes to static KV caches, and the concatenations that grow dynamic ones."""

    def __init__(self, graph: fx.Graph, any_width: bool = False) -> None:
        # With `any_width`, forwards of all query lengths use the same generated kernels, for the same bits of a token.
        self.graph, self._any_width = graph, any_width
        self.entries = {entry.cache: entry for entry in map(_entry, graph.nodes) if entry is not None}
        self.grown = tuple(node for node in graph.nodes if _grows_a_cache(node))

    def matmuls(self, role: str) -> list[fx.Node]:
        """Return the matmuls that feed the "cache", follow "attention", or are an MLP's "up" or "down"."""
        values = [entry.value for entry in self.entries.values()] or [node.args[0][1] for node in self.grown]
        caches = {*self.entries, *(node.args[0][0] for node in self.grown)}
        into_cache = sources(values)
        roles: dict[fx.Node, str] = {}
        for matmul in filter(is_river_linear, self.graph.nodes):
            reads = sources([matmul.args[0]])
            if matmul in into_cache:
                roles[matmul] = "cache"
            elif reads & caches:
                roles[matmul] = "attention"
            else:
                direct = all(roles[n] == "attention" for n in filter(is_river_linear, reads))
                roles[matmul] = "up" if direct else "down"
        return [matmul for matmul, found in roles.items() if found == role]

    @property
    def native(self) -> bool:
        return any(is_river_linear(n) and n.args[6] in ("dense", NATIVE_LAYOUT) for n in self.graph.nodes)

    @property
    def multi_position(self) -> bool:
        """Whether the kernels around the KV cache take several positions."""
        return self._any_width or self.native


@dataclass(frozen=True)
class CacheEntry:
    cache: fx.Node  # [B, J, S, D]
    value: fx.Node  # [B, J, T, D]
    slot: fx.Node  # [T]
    writer: fx.Node


def sources(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the nearest matmuls, placeholders and new tensors that values are computed from."""
    reached = closure(nodes, lambda n: () if is_river_linear(n) or _is_start(n) else n.all_input_nodes)
    return {n for n in reached if is_river_linear(n) or _is_start(n)}


def is_river_linear(node: Argument) -> TypeGuard[fx.Node]:
    """Whether a node is a ``river::linear``, with any norm and epilogue."""
    return called(node, torch.ops.river.linear.default)


@dataclass(frozen=True)
class Columns:
    matmul: fx.Node
    start: int
    stop: int  # exclusive


def columns(node: Argument) -> Columns | None:
    """Return the columns that a value consists of, in any view with the rows first; None for other values."""
    inner = skip_views(node)
    if not is_tensor(node) or not is_tensor(inner) or shape(inner)[0] != shape(node)[0]:
        return None
    if is_river_linear(inner):
        return Columns(inner, 0, value_of(inner).shape[-1])
    taken = part(inner)
    if taken is None or taken.step != 1 or taken.dim == 0:
        return None
    whole, sizes = columns(taken.source), shape(taken.source)
    after = [n for n in sizes[taken.dim + 1 :] if isinstance(n, int)]
    if whole is None or len(after) < len(sizes) - taken.dim - 1:
        return None
    as_matmul = not after and sizes[:-1] == shape(whole.matmul)[:-1]
    if not as_matmul and any(n != 1 for n in sizes[1 : taken.dim]):
        return None
    each = math.prod(after)
    start = whole.start + taken.start * each
    return Columns(whole.matmul, start, start + taken.length * each)


@dataclass(frozen=True)
class Part:
    """A slice of one dimension: `length` entries start, start + step, ... of `source`."""

    source: fx.Node
    dim: int
    start: int
    length: int
    step: int = 1


def part(node: Argument) -> Part | None:
    """Recognize ``x[..., a:b:c]``, ``x.split(...)[i]`` and ``x.chunk(...)[i]``."""
    if not called(node, operator.getitem):
        return None
    source, index = node.args
    if called(source, torch.split, torch.chunk) and isinstance(index, int):
        pieces = value_of(source)
        dim = source.args[2] % pieces[0].dim()
        lengths = [piece.shape[dim] for piece in pieces]
        return Part(source.args[0], dim, sum(lengths[:index]), lengths[index])
    if not is_tensor(source) or not isinstance(index, tuple):
        return None
    sizes = shape(source)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = (*index[:place], *[WHOLE] * (len(sizes) - len(index) + 1), *index[place + 1 :])
    taken = [(dim, i) for dim, i in enumerate(index) if i != WHOLE]
    if len(index) > len(sizes) or len(taken) != 1:
        return None
    ((dim, i),) = taken
    size = sizes[dim]
    if not isinstance(size, int):
        return None
    if isinstance(i, slice) and all(isinstance(n, (int, type(None))) for n in (i.start, i.stop, i.step)):
        entries = range(*i.indices(size))
        return Part(source, dim, entries.start, len(entries), entries.step)
    if isinstance(i, (list, tuple)) and len(i) == 1 and isinstance(i[0], int):
        return Part(source, dim, i[0] % size, 1)
    return None


def _entry(node: fx.Node) -> CacheEntry | None:
    if called(node, torch.Tensor.index_copy_) and _is_cache(node.args[0]) and node.args[1] in (2, -2):
        cache, _, slot, value = node.args
        return CacheEntry(cache, value, slot, node)
    return None


def _is_start(node: fx.Node) -> bool:
    """Whether a node reads no tensor: an input, or a new tensor such as an empty KV cache."""
    sizes = all(isinstance(value_of(n), (int, torch.SymInt)) for n in node.all_input_nodes)
    return node.op == "placeholder" or (is_tensor(node) and sizes)


def _is_cache(node: Argument) -> bool:
    return rank(node) == 4 and _is_start(node)


def _grows_a_cache(node: fx.Node) -> bool:
    if not called(node, torch.cat) or node.args[1] not in (2, -2) or len(node.args[0]) != 2:
        return False
    before, _ = node.args[0]
    return _is_cache(before) or (_is_start(before) and rank(node) == 4 and shape(before) == (0,))
