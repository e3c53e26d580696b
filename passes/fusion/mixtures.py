"""Fuses the router, the stacks and the weighted sum of a mixture of experts into operators of the C++ kernels.

Not handled: generated kernels, experts without a gate, norms after an expert. Of routers that choose in other ways than
by a softmax, the mixture is fused alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.kernels import mixture_ops
from river_compile.kernels.portable import route_like
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT
from river_compile.kernels.quant.mxfp4 import LAYOUT_MXFP4
from river_compile.passes.edits import (
    NoMatch,
    call,
    drop_unused,
    follow_uses,
    replace_node,
    require,
    reshape_like,
)
from river_compile.passes.experts import as_chosen, by_group
from river_compile.passes.fusion.match import BlockView, part
from river_compile.passes.fusion.recognise import activation, norm
from river_compile.passes.nodes import (
    called,
    either_way,
    is_ordinary,
    is_parameter,
    is_tensor,
    mutated_inputs,
    operands,
    other_operand,
    rank,
    same_dtype,
    same_size,
    shape,
    skip_casts,
    skip_views,
    value_of,
)

_BLOCK = 16  # the gated features are a multiple of it
_MOST_EXPERTS = 1024


def has_native_stacks(graph: fx.Graph) -> bool:
    """Whether a segment multiplies stacks of experts by the C++ kernels."""
    return any(_is_stack(node) and node.args[6] in ("dense", LAYOUT_MXFP4, NATIVE_LAYOUT) for node in graph.nodes)


def fuse_mixture(view: BlockView) -> fx.Node:
    """router + experts."""
    downs = [node for node in view.graph.nodes if _is_stack(node) and _up_of(node) is not None]
    require(len(downs) == 1, f"{len(downs) or 'no'} pairs of matmuls make a gated expert", None)
    found = _find(downs[0])
    graph, last = view.graph, found.last
    x = found.x
    with graph.inserting_before(last):
        index, weight = (_as_rows(node, found.each, last) for node in (found.index, found.weight))
        up, down = found.up.args, found.down.args
        arguments = (
            *(x, index, weight, *up[1:3], found.up_bias, up[5], *down[1:3], found.down_bias, down[5]),
            *(up[4] // 2, found.activation, found.pairs, f"{up[6]} {down[6]}"),
        )
        made = call(torch.ops.river.mixture.default, arguments, value_of(last), last)
    last.replace_all_uses_with(made)
    for write in found.writes:  # nothing reads what they return
        read = write.all_input_nodes
        graph.erase_node(write)
        for node in read:
            drop_unused(node)
    drop_unused(last)
    _fuse_router(view, made)
    _fuse_norm(made)
    return _fuse_residual(made)


@dataclass(frozen=True)
class _Mixture:
    """The nodes of ``sum over j of weight[m, j] down(act(gate) * up)`` of the experts ``index[m, j]``."""

    x: fx.Node  # [M, K]
    index: fx.Node  # in any shape of M rows of J numbers
    weight: fx.Node
    each: int  # J
    up: fx.Node
    down: fx.Node
    up_bias: fx.Node | None
    down_bias: fx.Node | None
    activation: str
    pairs: bool
    writes: tuple[fx.Node, ...]  # in place, of values that nothing else needs
    last: fx.Node  # the result [M, K] in x's dtype


def _is_stack(node: object) -> bool:
    return called(node, torch.ops.river.experts.default)


def _up_of(down: fx.Node) -> _Gated | None:
    return _gated(skip_casts(down.args[0]))


def _find(down: fx.Node) -> _Mixture:
    gated = _up_of(down)
    assert gated is not None
    up, (up_bias, added_up), (down_bias, added_down) = gated.up, _bias(gated.up), _bias(down)
    features = up.args[4] // 2
    require(features % _BLOCK == 0, f"the C++ kernels gate multiples of {_BLOCK} features, not {features}", up)
    order = _order(up, down)
    weighted = _only_user(down, added_down)
    weight = None
    for value, factor in either_way(weighted, operator.mul):
        if value is down and called(factor, torch.unsqueeze) and factor.args[1] in (-1, 1):
            weight = factor.args[0]
    require(is_tensor(weight), "its result is not multiplied by a weight for each row", weighted)
    last, writes = weighted, [*added_up, *added_down]
    if order.permutation is not None:
        weight = _taken(weight, order.permutation)
        require(weight is not None, "its weights are in another order", weighted)
        restored = _only_user(weighted)
        taken = operands(restored, operator.getitem)
        write = None if taken is None else _inverse(taken[1], order.permutation)
        require(write is not None, "its rows do not return to the order of the tokens", restored)
        writes.append(write)
        last = restored
    last = _only_user(last)
    each = order.each
    grouped = called(last, torch.reshape, Tensor.view) and rank(last) == 3 and shape(last)[1] == each
    require(grouped, "a token's experts are not summed", last)
    last = _only_user(last)
    summed = called(last, Tensor.sum) and last.kwargs.get("dim", last.args[1:]) in (1, (1,), [1])
    require(summed and rank(last) == 2, "a token's experts are not summed", last)
    if not same_dtype(last, up):
        last = _only_user(last)
        require(called(last, Tensor.to) and same_dtype(last, up), "the sum is in another dtype", last)
    require(shape(order.x)[1] == shape(last)[1], "an expert's input and output differ in size", down)
    return _Mixture(
        order.x, order.index, weight, each, up, down, up_bias, down_bias, gated.activation, gated.pairs,
        tuple(writes), last,
    )  # fmt: skip


@dataclass(frozen=True)
class _Order:
    """Where a stack's rows come from: `each` rows of every token, in their order or permuted."""

    x: fx.Node
    index: fx.Node
    each: int
    permutation: fx.Node | None


def _order(up: fx.Node, down: fx.Node) -> _Order:
    x, expert = skip_casts(up.args[0]), up.args[3]
    other = down.args[3]
    if called(expert, by_group) and called(other, by_group):
        ends, experts = expert.args[1:]
        require(other.args[1] is ends, "its two matmuls choose other experts", other)
        sort = _sorted_by(ends, experts)
        if sort is None:
            raise NoMatch("its groups are not those of sorted numbers of experts", ends)
        permutation = _item(sort, 1)
        token, place = operands(x, operator.getitem) or (x, None)
        divided, each = operands(place, operator.floordiv) or (None, None)
        if divided is permutation is not None and isinstance(each, int) and same_dtype(token, up):
            return _Order(token, sort.args[0], each, permutation)
        raise NoMatch("its rows are not a token's for each of its experts", x)
    if called(expert, as_chosen) and called(other, as_chosen) and expert.args[1] is other.args[1]:
        each = x.args[1] if called(x, Tensor.repeat_interleave) and len(x.args) == 2 else None
        if isinstance(each, int) and x.kwargs.get("dim") == 0 and same_dtype(x, up):
            return _Order(x.args[0], expert.args[1], each, None)
        raise NoMatch("its rows are not a token's for each of its experts", x)
    raise NoMatch("experts are not chosen by their numbers", expert)


def _sorted_by(ends: fx.Node, experts: int) -> fx.Node | None:
    """Return the sort of ``cumsum(histc(sort(numbers)[0]))`` over all experts."""
    counts = ends.args[0] if called(ends, torch.cumsum) and ends.kwargs.get("dim") == 0 else None
    bounds = {"bins": experts, "min": 0, "max": experts - 1}
    if not called(counts, torch.histc) or any(counts.kwargs.get(key) != value for key, value in bounds.items()):
        return None
    numbers = counts.args[0].args[0] if called(counts.args[0], Tensor.to) else counts.args[0]
    sort, item = operands(numbers, operator.getitem) or (None, None)
    plain = item == 0 and called(sort, torch.sort) and len(sort.args) == 1 and not sort.kwargs
    return sort if plain else None


def _taken(node: fx.Node, index: fx.Node) -> fx.Node | None:
    """Return the value from which a node takes the rows of an index."""
    value, place = operands(node, operator.getitem) or (None, None)
    return value if place is index else None


def _item(node: fx.Node, number: int) -> fx.Node | None:
    return next((user for user in node.users if operands(user, operator.getitem) == (node, number)), None)


def _inverse(index: object, permutation: fx.Node) -> fx.Node | None:
    """Return the write that makes an index the inverse of a permutation."""
    if not called(index, torch.empty_like):
        return None
    write = next((user for user in index.users if called(user, operator.setitem)), None)
    if write is None or write.args[:2] != (index, permutation) or not called(write.args[2], torch.arange):
        return None
    return write if len(index.users) == 2 and len(write.args[2].args) == 1 else None


def _bias(stack: fx.Node) -> tuple[fx.Node | None, tuple[fx.Node, ...]]:
    """Return the rows that are added to a stack's result in place by numbers of experts, and the addition."""
    for user in stack.users:
        if called(user, Tensor.add_) and user.args[0] is stack and len(user.args) == 2 and not user.users:
            taken = operands(user.args[1], operator.getitem)
            if taken and is_parameter(taken[0], dims=2) and same_dtype(taken[0], stack):
                return taken[0], (user,)
    return None, ()


@dataclass(frozen=True)
class _Gated:
    up: fx.Node
    activation: str
    pairs: bool


def _gated(node: object) -> _Gated | None:
    """Recognise ``act(gate) * up`` of a stack's result, gates first or every second, and gpt-oss's clamped form."""
    for left, right in either_way(node, operator.mul):
        found = activation(left)
        gate, up = part(found[0]) if found else None, part(right)
        if gate and up and found and _is_stack(gate.source) and gate.source is up.source:
            half = gate.source.args[4] // 2
            if (gate.start, up.start, gate.step, up.step) == (0, half, 1, 1) and gate.length == up.length == half:
                return _Gated(gate.source, found[1], False)
            if (gate.start, up.start, gate.step, up.step) == (0, 1, 2, 2):
                return _Gated(gate.source, found[1], True)
        source, start = _clamped_up(left) or (None, None)
        if _is_stack(source) and start == 1 and _clamped_swish(right) == (source, 0):
            return _Gated(source, mixture_ops.CLAMPED_SWISH, True)
    return None


def _clamped_up(node: object) -> tuple[fx.Node, int] | None:
    """Return the source and first column of every second one in ``clamp(up, -7, 7) + 1``."""
    clamp = other_operand(node, operator.add, 1)
    return _every_second(clamp, -mixture_ops.LIMIT) if is_tensor(clamp) else None


def _clamped_swish(node: object) -> tuple[fx.Node, int] | None:
    """Return the same of ``g * sigmoid(1.702 g)`` with ``g = clamp(gate, max=7)``."""
    for gate, sigmoid in either_way(node, operator.mul):
        if called(sigmoid, torch.sigmoid) and other_operand(sigmoid.args[0], operator.mul, mixture_ops.SLOPE) is gate:
            return _every_second(gate, None)
    return None


def _every_second(clamp: object, least: float | None) -> tuple[fx.Node, int] | None:
    if not called(clamp, Tensor.clamp, torch.clamp) or len(clamp.args) != 1:
        return None
    if (clamp.kwargs.get("min"), clamp.kwargs.get("max")) != (least, mixture_ops.LIMIT):
        return None
    taken = part(clamp.args[0])
    return (taken.source, taken.start) if taken and taken.step == 2 else None


def _only_user(node: fx.Node, besides: tuple[fx.Node, ...] = ()) -> fx.Node:
    users = [user for user in node.users if user not in besides]
    require(len(users) == 1 and users[0].op == "call_function", "its result is used more than once", node)
    return users[0]


def _as_rows(node: fx.Node, each: int, like: fx.Node) -> fx.Node:
    """Return numbers or weights as ``[M, each]``: before they were made flat if they were."""
    flat = called(node, torch.reshape, torch.flatten, Tensor.view) and rank(node) == 1
    if flat and rank(node.args[0]) == 2 and shape(node.args[0])[1] == each:
        return node.args[0]
    return call(torch.reshape, (node, (-1, each)), value_of(node).reshape(-1, each), like)


def _fuse_router(view: BlockView, mixture: fx.Node) -> None:
    """Replace the choice by ``river::route`` if it is by a softmax."""
    index, weight = mixture.args[1:3]
    found = _routing(index, weight)
    if found is None:
        return
    logits, routing = found
    each, floats = value_of(index).shape[1], value_of(weight).dtype == torch.float32
    if rank(logits) != 2 or value_of(logits).shape[1] > _MOST_EXPERTS or not (floats or same_dtype(weight, logits)):
        return
    first = min(index, weight)
    value = route_like(value_of(logits), each, floats)
    with view.graph.inserting_before(first):
        made = call(torch.ops.river.route.default, (logits, each, routing, floats), value, first)
        parts = [call(operator.getitem, (made, i), value[i], first) for i in range(2)]
    divided = skip_casts(weight)
    for old, new in zip((weight, index), parts, strict=True):
        old.replace_all_uses_with(new)
    for old in (weight, index):
        drop_unused(old)
    if divided is not weight and mutated_inputs(divided):  # (what writes is dropped only if asked for)
        drop_unused(divided)
    _own_linear(logits)


def _own_linear(logits: fx.Node) -> None:
    """Make a router's linear layer, which twins keep, an operator of the package."""
    if not called(logits, F.linear):
        return
    x, weight, bias = logits.args
    parameters = [weight] if bias is None else [weight, bias]
    plain = all(is_parameter(p) and is_ordinary(value_of(p)) and same_dtype(p, logits) for p in parameters)
    if plain and same_dtype(x, logits) and all(value_of(p).is_contiguous() for p in parameters):
        arguments = (x, weight, None, bias, shape(weight)[0], 0, "dense")
        replace_node(torch.ops.river.linear.default, arguments, value_of(logits), logits)


def _routing(index: fx.Node, weight: fx.Node) -> tuple[fx.Node, str] | None:
    """Return the logits that a top-k chooses from, and how the weights follow from them (`mixture_ops.route`)."""
    top = operands(index, operator.getitem)
    if (
        top is None
        or top[1] != 1
        or not called(top[0], torch.topk)
        or top[0].args[2:] not in ((), (-1,), (-1, True, True))
    ):
        return None
    topk = top[0]
    values, scores, inner = _item(topk, 0), topk.args[0], skip_casts(weight)
    if called(inner, torch.softmax) and skip_casts(inner.args[0]) is values and inner.args[1] in (-1, 1):
        return skip_casts(scores), "chosen"
    if not called(scores, torch.softmax) or scores.args[1] not in (-1, 1) or value_of(scores).dtype != torch.float32:
        return None
    logits = skip_casts(scores.args[0])
    if inner is values:
        return logits, "all"
    divided = operands(inner, operator.truediv, Tensor.div_)
    if divided and skip_casts(divided[0]) is values and called(divided[1], Tensor.sum) and divided[1].args[0] is values:
        return logits, "all_normalised"
    return None


def _fuse_norm(mixture: fx.Node) -> None:
    """Make the norm before router and experts one operator."""
    last = skip_views(mixture.args[0])
    found = norm(last)
    if found is not None and same_dtype(found.x, last):
        arguments = (found.x, found.kind, found.weight, found.bias, found.eps, None)
        replace_node(torch.ops.river.norm.default, arguments, value_of(found.x), last)


def _fuse_residual(mixture: fx.Node) -> fx.Node:
    """Add the residual in the mixture if it is all that follows."""
    try:
        last, total = follow_uses(mixture)
    except NoMatch:
        return mixture
    found = operands(total, operator.add)
    if found is None or found[0] is found[1] or not all(is_tensor(n) and same_size(n, total) for n in found):
        return mixture
    residual, views = found[1] if found[0] is last else found[0], [last]
    if not same_dtype(residual, mixture):
        return mixture
    while views[-1] is not mixture:
        views.append(views[-1].args[0])
    graph = mixture.graph
    with graph.inserting_before(total):
        rows = reshape_like(residual, mixture)
        made = result = call(mixture.target, (*mixture.args[:15], rows), value_of(mixture), mixture)
        for before, view in reversed(list(zip(views[1:], views, strict=False))):  # with the sizes of the model's code
            result = graph.node_copy(view, lambda n, old=before, new=result: new if n is old else n)
    total.replace_all_uses_with(result)
    drop_unused(total)
    return made
