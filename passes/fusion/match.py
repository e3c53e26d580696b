"""Which part of a matmul a value consists of: ranges of one dimension, and columns.

Nothing here changes a graph or adds a guard. Not handled: ranges of several dimensions at once.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import fx
from torch.fx.node import Argument

from river_compile.passes.nodes import before_views, called, is_tensor, shape, value_of

WHOLE = slice(None, None, None)


@dataclass(frozen=True)
class Part:
    """A range of one dimension: entries start, start + step, ... of `source`, `length` of them."""

    source: fx.Node
    dim: int
    start: int
    length: int
    step: int = 1


def part(node: Argument) -> Part | None:
    """Returns the range that ``x[..., a:b:c]``, ``x.split(...)[i]`` or ``x.chunk(...)[i]`` takes."""
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


@dataclass(frozen=True)
class Columns:
    """Columns start..stop - 1 of every row of a matmul, in their order."""

    product: fx.Node
    start: int
    stop: int


def is_product(node: Argument) -> TypeGuard[fx.Node]:
    """True for a ``river::linear``, whatever its norm and epilogue."""
    return called(node, torch.ops.river.linear.default)


def columns(node: Argument) -> Columns | None:
    """Returns the columns of a matmul that a value consists of, in any view with the rows in front."""
    inner = before_views(node)
    if not is_tensor(node) or not is_tensor(inner) or shape(inner)[0] != shape(node)[0]:
        return None
    if is_product(inner):
        return Columns(inner, 0, value_of(inner).shape[-1])
    taken = part(inner)
    if taken is None or taken.step != 1 or taken.dim == 0:
        return None
    whole, sizes = columns(taken.source), shape(taken.source)
    after = [n for n in sizes[taken.dim + 1 :] if isinstance(n, int)]
    if whole is None or len(after) < len(sizes) - taken.dim - 1:
        return None
    as_product = not after and sizes[:-1] == shape(whole.product)[:-1]
    if not as_product and any(n != 1 for n in sizes[1 : taken.dim]):
        return None
    each = math.prod(after)
    start = whole.start + taken.start * each
    return Columns(whole.product, start, start + taken.length * each)
