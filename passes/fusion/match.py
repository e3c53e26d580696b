"""What recognising operations stands on: names, operands, and looking through views, casts and ranges of columns.

Names decide, not objects, so that ``x + y``, ``torch.add(x, y)`` and ``x.add(y)`` are one thing. Nothing here changes a
graph or adds a guard: dynamic sizes are compared as text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from river_compile.passes.nodes import is_tensor, shape, value_of

_CASTS = ("to",)
VIEWS = ("reshape", "view", "flatten", "unsqueeze", "squeeze", "contiguous")
WHOLE = slice(None, None, None)


def name_of(node: object) -> str:
    """Returns "add" for ``operator.add``, ``torch.add`` and the method; an operator's name; "" for other nodes."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.partition(".")[0]


def operands(node: object, *names: str) -> tuple[object, object] | None:
    """Returns both operands of a binary operation of one of these names."""
    fits = name_of(node) in names and len(node.args) == 2 and not node.kwargs
    return tuple(node.args) if fits else None


def either_way(node: object, *names: str) -> Iterator[tuple[object, object]]:
    """Yields the operands of a commutative operation in both orders."""
    found = operands(node, *names)
    if found:
        yield found
        yield found[::-1]


def argument(node: fx.Node, place: int, name: str, default: object = None) -> object:
    """Returns an argument that may stand at a place or under a name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def before_cast(node: object) -> object:
    """Looks through changes of the floating dtype."""
    while name_of(node) in _CASTS and _is_cast(node):
        node = node.args[0]
    return node


def _is_cast(node: fx.Node) -> bool:
    values = [value_of(node), value_of(node.args[0])]
    return all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values) and (
        values[0].device == values[1].device
    )


def plain(node: object) -> object:
    """Looks through what changes no value: dropout at inference, casts to the same dtype, ``contiguous``, ``x[:]``."""
    while True:
        name = name_of(node)
        keeps = name == "contiguous"
        keeps = keeps or (name == "dropout" and argument(node, 2, "training", True) is False)
        keeps = keeps or (name == "getitem" and _takes_all(node))
        keeps = keeps or (name in _CASTS and _is_cast(node) and same_dtype(node, node.args[0]))
        if not keeps:
            return node
        node = node.args[0]


def same_dtype(a: fx.Node, b: fx.Node) -> bool:
    return value_of(a).dtype == value_of(b).dtype


def _takes_all(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    return all(isinstance(i, slice) or i is Ellipsis for i in index) and shape(node) == shape(source)


def before_views(node: object) -> object:
    """Looks through `plain` and through views that keep the order of the elements."""
    while True:
        node = plain(node)
        if not _keeps_order(node):
            return node
        node = node.args[0]


def _keeps_order(node: object) -> bool:
    name = name_of(node)
    if name in VIEWS:
        return is_tensor(node) and is_tensor(node.args[0]) and same_dtype(node, node.args[0])
    if name not in ("transpose", "permute", "swapaxes", "movedim") or not is_tensor(node.args[0]):
        return False
    dims = value_of(node.args[0]).dim()
    order = list(range(dims))
    if name in ("transpose", "swapaxes"):
        a, b = (argument(node, place, key) for place, key in ((1, "dim0"), (2, "dim1")))
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        order = [d % dims for d in node.args[1]]
    else:
        return False
    sizes = shape(node.args[0])
    moved = [d for d in order if sizes[d] != 1]
    return moved == sorted(moved)


@dataclass(frozen=True)
class Part:
    """A range of one dimension: entries start, start + step, ... of `source`, `length` of them."""

    source: fx.Node
    dim: int
    start: int
    length: int
    step: int = 1


def part(node: object) -> Part | None:
    """Returns the range that ``x[..., a:b:c]``, ``x.split(...)[i]`` or ``x.chunk(...)[i]`` takes."""
    if name_of(node) != "getitem":
        return None
    source, index = node.args
    if name_of(source) in ("split", "chunk") and isinstance(index, int):
        pieces = value_of(source)
        dim = argument(source, 2, "dim", 0) % pieces[0].dim()
        lengths = [piece.shape[dim] for piece in pieces]
        return Part(source.args[0], dim, sum(lengths[:index]), lengths[index])
    if not isinstance(source, fx.Node) or not is_tensor(source) or not isinstance(index, tuple):
        return None
    return _slice(source, index)


def _slice(source: fx.Node, index: tuple) -> Part | None:
    sizes = shape(source)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        index = (*index[:place], *[WHOLE] * (len(sizes) - len(index) + 1), *index[place + 1 :])
    taken = [(dim, i) for dim, i in enumerate(index) if i != WHOLE]
    if len(index) > len(sizes) or len(taken) != 1:
        return None
    ((dim, i),) = taken
    if not isinstance(sizes[dim], int):
        return None
    if isinstance(i, slice) and all(isinstance(n, (int, type(None))) for n in (i.start, i.stop, i.step)):
        entries = range(*i.indices(sizes[dim]))
        return Part(source, dim, entries.start, len(entries), entries.step)
    if isinstance(i, (list, tuple)) and len(i) == 1 and isinstance(i[0], int):
        return Part(source, dim, i[0] % sizes[dim], 1)
    return None


@dataclass(frozen=True)
class Columns:
    """Columns start..stop - 1 of every row of a matrix product, in their order."""

    product: fx.Node
    start: int
    stop: int


def is_product(node: object) -> bool:
    """True for a ``river::linear``, whatever its norm and epilogue."""
    return isinstance(node, fx.Node) and node.target is torch.ops.river.linear.default


def columns(node: object) -> Columns | None:
    """Returns the columns of a matrix product that a value consists of, in any view with the rows in front."""
    if not isinstance(node, fx.Node) or not is_tensor(node):
        return None
    rows = shape(node)[0]
    node = before_views(node)
    if not isinstance(node, fx.Node) or not is_tensor(node) or shape(node)[0] != rows:
        return None
    if is_product(node):
        return Columns(node, 0, shape(node)[-1])
    taken = part(node)
    if taken is None or taken.step != 1 or taken.dim == 0:
        return None
    whole, sizes = columns(taken.source), shape(taken.source)
    behind = sizes[taken.dim + 1 :]
    if whole is None or not all(isinstance(n, int) for n in behind):
        return None
    as_product = not behind and sizes[:-1] == shape(whole.product)[:-1]
    if not as_product and any(n != 1 for n in sizes[1 : taken.dim]):
        return None
    each = math.prod(behind)
    start = whole.start + taken.start * each
    return Columns(whole.product, start, start + taken.length * each)
