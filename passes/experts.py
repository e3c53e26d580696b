"""Finds matmuls with stacked experts and replaces them by ``river::experts``; finds routers.

Not handled: experts in a module list or a loop, which break the graph; routers that cast their weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.kernels import mixture_ops, ops  # noqa: F401  (registers river::experts and river::mixture)
from river_compile.kernels.quant.grid import fitting_group_size
from river_compile.kernels.quant.mxfp4 import LAYOUT_MXFP4, mxfp4_parts
from river_compile.passes.edits import call, cast_like, drop_unused, reshape_like
from river_compile.passes.nodes import called, closure, input_name, is_parameter, is_tensor, rank, shape, value_of
from river_compile.passes.program import Matmul, Segment

ROUTER = "a router: its result chooses what else is computed"
_MATMULS = (
    *(F.linear, operator.matmul, torch.bmm, torch.addmm, torch.baddbmm, torch.mm, torch.einsum),
    *(F.scaled_dot_product_attention, torch.conv1d, F.conv1d),
)
_OPERATORS = (torch.ops.river.linear.default, torch.ops.river.experts.default, torch.ops.river.mixture.default)


@dataclass(frozen=True)
class ExpertMatmul:
    """Rows and the expert of each: ``y[m] = x[m] W[expert[m]]^T``."""

    node: fx.Node  # the result, in any shape of M rows
    x: fx.Node  # in any shape of M rows of K features
    weight: fx.Node  # [E, N, K], or [E, K, N] if `transposed`
    transposed: bool
    route: fx.Node | None  # second argument of `expert`
    expert: Callable[..., Tensor]  # traceable: (rows [M, K], route, E) -> the expert of each row, integer [M]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Returns (E, N, K)."""
        e, n, k = value_of(self.weight).shape
        return (e, k, n) if self.transposed else (e, n, k)

    def matmul(self, number_of: Mapping[fx.Node, int], group_size: int, layout: str) -> Matmul:
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
    """Recognize ``grouped_mm(x, weight, offs)``, ``bmm(x, weight)`` and ``bmm(weight[chosen], x)``."""
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


def replace_expert_matmul(
    graph: fx.Graph, found: ExpertMatmul, weight: fx.Node, scale_zero: fx.Node | None, group_size: int, layout: str
) -> None:
    """Replace a matmul by one ``river::experts`` with these operands."""
    node, x = found.node, found.x
    experts, out_features, in_features = found.shape
    if called(x, torch.unsqueeze) and rank(x.args[0]) == 2:
        x = x.args[0]
    many = value_of(node).numel() // out_features
    with graph.inserting_before(node):
        if rank(x) != 2:
            x = call(torch.reshape, (x, (-1, in_features)), value_of(x).new_empty((many, in_features)), node)
        x = cast_like(node, x)
        chosen = value_of(x).new_empty((many,), dtype=torch.int64)
        expert = call(found.expert, (x, found.route, experts), chosen, node)
        arguments = (x, weight, scale_zero, expert, out_features, group_size, layout)
        value = value_of(x).new_empty((many, out_features))
        result = reshape_like(call(torch.ops.river.experts.default, arguments, value, node), node)
    node.replace_all_uses_with(result)
    drop_unused(node)


def is_mxfp4(parameter: fx.Node) -> bool:
    """Whether a stack's parameter lies in memory as MXFP4."""
    return mxfp4_parts(value_of(parameter)) is not None


def read_mxfp4(graph: fx.Graph) -> list[fx.Node]:
    """Have matmuls with MXFP4 stacks read their bytes, by ``river::experts``; return the parameters."""
    found = [stack for stack in filter(None, map(as_expert_matmul, list(graph.nodes))) if is_mxfp4(stack.weight)]
    for stack in found:
        replace_expert_matmul(graph, stack, stack.weight, None, 0, LAYOUT_MXFP4)
    return [stack.weight for stack in found]


def stack_parameter(operand: object) -> fx.Node | None:
    """Return the parameter ``[E, N, K]``, or ``[E, K, N]`` seen transposed, that an operator's stack is; else None."""
    node = operand.args[0] if called(operand, torch.transpose) else operand
    return node if is_parameter(node, dims=3) else None


def is_router(matmul: fx.Node) -> bool:
    """Whether a matmul's result reaches a top-k or a maximum with no other matmul in between."""
    # Twins keep it in 16 bits: it has one row for each expert, and a rounding that flips a choice swaps weights.
    return any(map(_chooses, closure(matmul.users, lambda node: () if _multiplies(node) else node.users)))


def experts_per_token(segment: Segment) -> dict[fx.Node, int]:
    """Return k of the nearest top-k before each placeholder of experts, packed or not, that has one."""
    counts = {stack: _top_k(node) for node in segment.graph.nodes for stack in _stacks(node)}
    return {stack: count for stack, count in counts.items() if count is not None}


def as_chosen(_rows: Tensor, chosen: Tensor, _experts: int) -> Tensor:
    return chosen


def by_group(rows: Tensor, ends: Tensor, _experts: int) -> Tensor:
    """Return the group of each row, E after the last one; `ends` of the groups are ``[E]``."""
    return torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device, dtype=ends.dtype), right=True)


def by_place(rows: Tensor, _route: None, experts: int) -> Tensor:
    """Return the expert of each row, by its position; E for a row of zeros, whose result is zero anyway."""
    places = torch.arange(experts, device=rows.device)[:, None].expand(experts, rows.shape[0] // experts)
    return torch.where((rows != 0).any(-1), places.reshape(-1), experts)


@dataclass(frozen=True)
class _Stack:
    weight: fx.Node
    swapped: bool  # whether its last two dimensions are transposed
    chosen: fx.Node | None  # experts that are gathered; None: all


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
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # registered by transformers
    functions = (torch._grouped_mm, getattr(F, "grouped_mm", None), fallback, getattr(fallback, "default", None))
    given = {name for name, value in node.kwargs.items() if value is not None}
    return node.target in functions and given == {"offs"}


def _stacks(node: fx.Node) -> tuple[fx.Node, ...]:
    if called(node, torch.ops.river.experts.default):
        return _placeholders(node.args[1:3])
    if called(node, torch.ops.river.mixture.default):
        return _placeholders((*node.args[3:5], *node.args[7:9]))
    found = as_expert_matmul(node)
    return () if found is None else (found.weight,)


def _placeholders(operands: Iterable[fx.Node | None]) -> tuple[fx.Node, ...]:
    given = (operand for operand in operands if operand is not None)
    return tuple(operand.args[0] if called(operand, torch.transpose) else operand for operand in given)


def _top_k(node: fx.Node) -> int | None:
    """Return k of the nearest top-k before a node, None if there is none."""
    seen, latest = {node}, [node]
    while latest:
        for found in latest:
            if called(found, torch.ops.river.mixture.default):
                return int(value_of(found.args[1]).shape[1])
            if called(found, torch.topk) and isinstance(found.args[1], int):
                return found.args[1]
        latest = list(dict.fromkeys(a for n in latest for a in n.all_input_nodes if a not in seen))
        seen.update(latest)
    return None


def _chooses(node: fx.Node) -> bool:
    chooses = (torch.topk, torch.argmax, torch.ops.river.route.default)
    return called(node, *chooses) or (called(node, torch.max, Tensor.max) and _returns_indices(node))


def _returns_indices(node: fx.Node) -> bool:
    """Whether a maximum is along a dimension, and so returns indices too."""
    return isinstance(node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None), int)


def _multiplies(node: fx.Node) -> bool:
    return called(node, *_MATMULS, *_OPERATORS) or as_expert_matmul(node) is not None
