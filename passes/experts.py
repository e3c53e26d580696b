"""Finds matmuls of rows with the experts that a router chose, and makes them ``river::experts``.

The experts' matrices are stacked in one parameter, ``[E, N, K]`` or ``[E, K, N]``. Three spellings say which of them a
row meets:

    gathered    the matrices are looked up for each row and multiplied in one batch: ``bmm(weight[chosen], x)``
    grouped     rows are sorted by expert, and the ends of the groups are given: ``grouped_mm(x, weight, offs)``
    batched     every expert has rows of its own, of which those that it was not chosen for are zero: ``bmm(x, weight)``

What surrounds the products (the router, biases, activations, the weighted sum) stays as it is.

Not handled: experts in a module list, and loops over experts that were hit: both depend on values and break the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.kernels import ops  # noqa: F401  (registers river::experts)
from river_compile.kernels.quant.grid import fitting_group_size
from river_compile.passes.edits import add_placeholders, call, cast_like, drop_unused, reshape_like
from river_compile.passes.nodes import called, closure, input_name, is_parameter, is_tensor, rank, shape, value_of
from river_compile.passes.program import Matmul, Segment


@dataclass(frozen=True)
class ExpertMatmul:
    """Rows and the expert of each: ``y[m] = x[m] W[expert[m]]^T``.

    Attributes:
        node: what gives the product, in any shape of M rows.
        x: the rows, in any shape of M rows of K features.
        weight: the parameter, ``[E, N, K]``, or ``[E, K, N]`` where it is `transposed`.
        route: what says where rows go, None where their places do.
        expert: traceable, (rows ``[M, K]``, route or None, E) -> the expert of each row, integer ``[M]``.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    transposed: bool
    route: fx.Node | None
    expert: Callable[..., Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        e, n, k = value_of(self.weight).shape
        return (e, k, n) if self.transposed else (e, n, k)

    def matmul(self, number_of: Mapping[fx.Node, int], group_size: int, layout: str) -> Matmul:
        """Returns the 4-bit matmul that this becomes."""
        experts, out_features, in_features = self.shape
        return Matmul(
            name=input_name(self.weight),
            weights=(number_of[self.weight],),
            biases=(None,),
            in_features=in_features,
            out_features=(experts * out_features,),
            transposed=self.transposed,
            group_size=fitting_group_size(in_features, group_size),
            layout=layout,
            experts=experts,
        )


def as_expert_matmul(node: fx.Node) -> ExpertMatmul | None:
    """Recognises a product with stacked experts of a parameter in any of the three spellings."""
    if not is_tensor(node) or node.op != "call_function" or len(node.args) != 2:
        return None
    left, right = node.args
    stack = _stack_of(right)
    if _is_grouped(node):
        if stack is None or stack.chosen is not None or rank(left) != 2:
            return None
        return ExpertMatmul(node, left, stack.weight, not stack.swapped, node.kwargs["offs"], by_group)
    if not called(node, torch.bmm, operator.matmul) or rank(left) != 3 or rank(right) != 3:
        return None
    if stack is not None and stack.chosen is None:
        return ExpertMatmul(node, left, stack.weight, not stack.swapped, None, by_place)
    if stack is not None and shape(left)[1] == 1:
        return ExpertMatmul(node, left, stack.weight, not stack.swapped, stack.chosen, as_chosen)
    stack = _stack_of(left)
    if stack is not None and stack.chosen is not None and shape(right)[2] == 1:
        return ExpertMatmul(node, right, stack.weight, stack.swapped, stack.chosen, as_chosen)
    return None


def replace_expert_matmul(graph: fx.Graph, product: ExpertMatmul, linear: Matmul, index: int) -> None:
    """Puts one ``river::experts`` in place of a product, the `index`-th one of its twin."""
    node, x = product.node, product.x
    experts, out_features, in_features = product.shape
    qweight, scale_zero = add_placeholders(graph, [f"river_{index}_{name}" for name in ("qweight", "scale_zero")])
    if called(x, torch.unsqueeze) and rank(x.args[0]) == 2:
        x = x.args[0]
    many = value_of(node).numel() // out_features
    with graph.inserting_before(node):
        if rank(x) != 2:
            x = call(torch.reshape, (x, (-1, in_features)), value_of(x).new_empty((many, in_features)), node)
        x = cast_like(node, x)
        chosen = value_of(x).new_empty((many,), dtype=torch.int64)
        expert = call(product.expert, (x, product.route, experts), chosen, node)
        arguments = (x, qweight, scale_zero, expert, out_features, linear.group_size, linear.layout)
        value = value_of(x).new_empty((many, out_features))
        result = reshape_like(call(torch.ops.river.experts.default, arguments, value, node), node)
    node.replace_all_uses_with(result)
    drop_unused(node)


def as_chosen(_rows: Tensor, chosen: Tensor, _experts: int) -> Tensor:
    """Returns the numbers that the matrices were looked up by."""
    return chosen


def by_group(rows: Tensor, ends: Tensor, _experts: int) -> Tensor:
    """Returns the group that each row lies in, E after the last one; `ends` are those of the groups ``[E]``."""
    return torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype), right=True)


def by_place(rows: Tensor, _route: None, experts: int) -> Tensor:
    """Returns the expert whose share of the rows a row lies in, E for a row of zeros: its product is zero too."""
    places = torch.arange(experts, device=rows.device)[:, None].expand(experts, rows.shape[0] // experts)
    return torch.where((rows != 0).any(-1), places.reshape(-1), experts)


@dataclass(frozen=True)
class _Stack:
    """A parameter ``[E, ., .]``, whether its last two dimensions are swapped, and the matrices chosen (None: all)."""

    weight: fx.Node
    swapped: bool
    chosen: fx.Node | None


def _stack_of(node: object) -> _Stack | None:
    swapped, chosen = False, None
    while not is_parameter(node, dims=3):
        if called(node, torch.transpose) and {d % 3 for d in node.args[1:]} == {1, 2}:
            swapped = not swapped
            node = node.args[0]
        elif called(node, operator.getitem) and chosen is None and _is_choice(node.args[1]):
            node, chosen = node.args
        else:
            return None
    return _Stack(node, swapped, chosen)


def _is_choice(index: object) -> bool:
    return rank(index) == 1 and not value_of(index).is_floating_point() and value_of(index).dtype is not torch.bool


def _is_grouped(node: fx.Node) -> bool:
    """True for a grouped product of rows without bias and cast."""
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # (transformers registers it)
    functions = (torch._grouped_mm, getattr(F, "grouped_mm", None), fallback, getattr(fallback, "default", None))
    given = {name for name, value in node.kwargs.items() if value is not None}
    return node.target in functions and given == {"offs"}


ROUTER = "a router: its result chooses what else is computed"
_PRODUCTS = (
    *(F.linear, operator.matmul, torch.bmm, torch.addmm, torch.baddbmm, torch.mm, torch.einsum),
    *(F.scaled_dot_product_attention, torch.conv1d, F.conv1d),
)


def is_router(product: fx.Node) -> bool:
    """Returns whether the result of a matmul chooses experts, and nothing else multiplies it on the way."""
    return any(map(_chooses, closure(product.users, lambda node: () if _multiplies(node) else node.users)))


def experts_per_token(segment: Segment) -> dict[fx.Node, int]:
    """Returns how many matrices one token reads of each placeholder of a segment that holds experts, packed or not.

    The top-k that comes closest before their product says it; stacks without one are not among them.
    """
    counts = {stack: _top_k(node) for node in segment.graph.nodes for stack in _stacks(node)}
    return {stack: count for stack, count in counts.items() if count is not None}


def _stacks(node: fx.Node) -> tuple[fx.Node, ...]:
    """Returns the placeholders that hold the experts of a product, in 16 bits or packed."""
    if called(node, torch.ops.river.experts.default):
        return node.args[1:3]
    product = as_expert_matmul(node)
    return () if product is None else (product.weight,)


def _top_k(node: fx.Node) -> int | None:
    """Returns k of the nearest top-k before a node, None if there is none."""
    seen, latest = {node}, [node]
    while latest:
        for found in latest:
            if called(found, torch.topk) and isinstance(found.args[1], int):
                return found.args[1]
        latest = list(dict.fromkeys(a for n in latest for a in n.all_input_nodes if a not in seen))
        seen.update(latest)
    return None


def _chooses(node: fx.Node) -> bool:
    return called(node, torch.topk, torch.argmax) or (called(node, torch.max, Tensor.max) and _gives_places(node))


def _gives_places(node: fx.Node) -> bool:
    """True for a maximum along a dimension, which comes with where it is."""
    return isinstance(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None), int)


def _multiplies(node: fx.Node) -> bool:
    return called(node, *_PRODUCTS) or as_expert_matmul(node) is not None
