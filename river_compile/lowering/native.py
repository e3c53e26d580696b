"""Runs segments as calls of the C++ operators, without Inductor if nothing else is left to compute.

Such a segment can be recorded by a :class:`Tape`. In other segments the operators are opaque calls for Inductor.
Not handled: prompts at the speed of a library's wide matmuls.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from river_compile.kernels.native import load as native
from river_compile.kernels.native.load import Tape
from river_compile.kernels.portable import largest_entropy
from river_compile.kernels.quant import lossless
from river_compile.kernels.quant.layouts import NATIVE_LAYOUT
from river_compile.kernels.quant.mxfp4 import LAYOUT_MXFP4
from river_compile.passes.backbone import parts_of
from river_compile.passes.edits import drop_unused
from river_compile.passes.nodes import called, is_tensor, rank, shape, value_of
from river_compile.passes.program import Segment

# Operators that return views of their input. If one of them has to copy, recording fails.
_VIEWS = (
    torch.reshape,
    torch.flatten,
    torch.squeeze,
    torch.unsqueeze,
    torch.transpose,
    torch.split,
    Tensor.contiguous,
    Tensor.expand,
    Tensor.reshape,
    Tensor.transpose,
    Tensor.view,
    operator.getitem,
)
_STACKS = ("dense", NATIVE_LAYOUT, lossless.LAYOUT_12BIT, LAYOUT_MXFP4)  # layouts of experts
# Operators that make a tensor of numbers alone; a recording keeps its values.
_CONSTANTS = (torch.arange, torch.full, torch.zeros)

# A compiled segment: a function of a list, which it may empty, that returns a sequence.
Callee: TypeAlias = Callable[[list[Any]], Sequence[Any]]


class CannotRecord(RuntimeError):
    """With these tensors a segment computes something outside of the C++ operators."""


class NativeSegment:
    """A segment as calls of the C++ operators."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self._run = graph_module.forward
        self._graph_module = graph_module

    def __call__(self, inputs: list) -> Sequence[Any]:
        return self._run(*inputs)

    def record(self, inputs: list, tape: Tape) -> Sequence[Any]:
        """Record the calls; the outputs have no values yet. Raise a CannotRecord if a view is a copy."""
        return self._recorded(tape, *inputs)

    @functools.cached_property
    def _recorded(self) -> Callable[..., Sequence[Any]]:
        """The calls with checks of views between them; the tape keeps constants alive."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(self._graph_module.graph, {}))
        first, *_ = graph.nodes
        with graph.inserting_before(first):
            tape = graph.placeholder("tape")
        for node in [node for node in graph.nodes if node.op == "call_function"]:
            with graph.inserting_after(node):
                if node.target is torch.zeros:
                    graph.call_function(_reject_written, (node.name,))
                elif node.target in _CONSTANTS:
                    graph.call_method("keep", (tape, node))
                elif node.target in _VIEWS:
                    graph.call_function(_check_view, (node.name, node, *node.all_input_nodes))
        return fx.GraphModule(self._graph_module, graph, class_name="Recorded").forward


def _reject_written(name: str) -> None:
    raise CannotRecord(f"{name} makes a tensor that is written")


def _check_view(name: str, results: Tensor | Sequence[Any], *sources: object) -> None:
    """Raise a CannotRecord if a result does not share the memory of a source."""
    places = {source.untyped_storage().data_ptr() for source in sources if isinstance(source, Tensor)}
    for value in results if isinstance(results, (tuple, list)) else [results]:
        if isinstance(value, Tensor) and places and value.untyped_storage().data_ptr() not in places:
            raise CannotRecord(f"{name} copies what is computed before it")


def native_graph(segment: Segment) -> fx.GraphModule | None:
    """Return a segment as calls of the C++ operators, None if it computes something else."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(segment.graph, {}))
    use_native(graph)
    _use_native_counters(graph)
    _use_native_inputs(graph)
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and node.target in (torch.roll, torch._C._log_api_usage_once):
            graph.erase_node(node)
    if not all(map(_is_native, graph.nodes)):
        return None
    return fx.GraphModule(segment.graph.owning_module, graph, class_name="Segment")


def foreign_operators(graph: fx.Graph) -> list[str]:
    """Return the names of a lowered graph's operators that have no C++ kernel, each once."""
    targets = dict.fromkeys(node.target for node in graph.nodes if node.op == "call_function")
    return [
        getattr(target, "__name__", str(target))
        for target in targets
        if getattr(target, "namespace", None) != "river_native" and target not in (*_VIEWS, *_CONSTANTS)
    ]


def use_native(graph: fx.Graph) -> None:
    """Replace the operators of `torch.ops.river` by the C++ ones, linears if their layout is native."""
    ours, native_ops = torch.ops.river, native.load()
    alike = {
        getattr(ours, name).default: getattr(native_ops, name).default
        for name in ("norm", "rescore", "route", "kv_fill", "decode_attention", "attention", "exit_score")
    }
    for node in list(graph.nodes):
        if node.target in alike:
            node.target = alike[node.target]
        elif called(node, ours.linear.default):
            _use_native_linear(node, native_ops)
        elif called(node, ours.experts.default) and node.args[-1] in _STACKS:
            *tensors, out_features, group_size, _ = node.args
            node.target, node.args = native_ops.experts.default, (*tensors, out_features, group_size)
        elif called(node, ours.mixture.default):
            *before, _layouts = node.args[:15]
            node.target, node.args = native_ops.mixture.default, (*before, *node.args[15:])


def _use_native_linear(node: fx.Node, native_ops: Any) -> None:
    x, weight, scale_zero, bias, out_features, group_size, layout = node.args
    if layout in (NATIVE_LAYOUT, lossless.LAYOUT_12BIT, lossless.LAYOUT_8BIT):
        node.target, node.args = native_ops.linear.default, (x, weight, scale_zero, bias, out_features, group_size)
    elif layout == "dense":
        node.target, node.args = native_ops.dense.default, (x, parts_of(weight), parts_of(bias))
        for joined in filter(None, (weight, bias)):
            drop_unused(joined)


def _use_native_counters(graph: fx.Graph) -> None:
    """Replace counters and scores of heads by operators that a tape can record."""
    native_ops = native.load()
    for node in list(graph.nodes):
        if called(node, largest_entropy):
            node.target = native_ops.largest_entropy.default
        elif called(node, operator.add) and _are_positions(*node.args):
            node.target = native_ops.add.default
        elif called(node, Tensor.to) and _is_no_op_cast(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif called(node, Tensor.add_) and _is_counter(node.args[0]) and _is_number(node.args[1]) and not node.users:
            node.target = native_ops.advance.default


def _use_native_inputs(graph: fx.Graph) -> None:
    """Replace the embedding, and rotary tables in its dtype, by operators that a tape can record."""
    native_ops = native.load()
    table: fx.Node | None = None
    for node in list(graph.nodes):
        if called(node, F.embedding) and _is_plain_embedding(node):
            table = node.args[1]
            node.target, node.args, node.kwargs = native_ops.embed.default, node.args[:2], {}
        elif table is not None and (called(node, Tensor.cos) or called(node, Tensor.sin)):
            once = not called(node.args[0], torch.cat)
            angles = _angles(node.args[0])
            last, scale = _scaled(node)
            if angles is None or value_of(last).dtype != value_of(table).dtype:
                continue
            sine = called(node, Tensor.sin)
            with graph.inserting_before(last):
                turns = graph.call_function(native_ops.turns.default, (*angles, scale, sine, table, once))
            turns.meta.update(last.meta)
            last.replace_all_uses_with(turns)
            drop_unused(last)


def _is_int64(node: object) -> bool:
    return is_tensor(node) and value_of(node).dtype == torch.int64


def _is_plain_embedding(embedding: fx.Node) -> bool:
    """True for an embedding without a maximal norm."""
    ids, table, *others = embedding.args
    return others[1:2] in ([], [None]) and not embedding.kwargs.get("max_norm") and _is_int64(ids) and rank(table) == 2


def _angles(node: object) -> tuple[fx.Node, fx.Node] | None:
    """Return positions P and frequencies F of ``a = P * F`` in float32, or of ``cat((a, a), -1)``."""
    angles = node
    if called(node, torch.cat):
        if node.kwargs or node.args[1:] not in ((-1,), (2,)) or len(node.args[0]) != 2 or len({*node.args[0]}) != 1:
            return None
        angles = node.args[0][0]
    if not called(angles, operator.mul) or value_of(angles).dtype != torch.float32:
        return None
    for cast, frequencies in (angles.args, angles.args[::-1]):
        if called(cast, Tensor.to) and cast.args[1:] == (torch.float32,) and called(cast.args[0], operator.getitem):
            positions, place = cast.args[0].args
            if called(frequencies, Tensor.to) and value_of(frequencies).dtype == torch.float32:
                frequencies = frequencies.args[0]  # the whole model was cast; the operator reads them so
            if place == (..., None) and _is_int64(positions) and _is_row_of_floats(frequencies):
                return positions, frequencies
    return None


def _is_row_of_floats(node: object) -> bool:
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return (
        is_tensor(node) and rank(node) == 1 and value_of(node).dtype in floats and value_of(node).device.type == "cpu"
    )


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """Return the last node of an optional multiplication by a number and a cast, and the number."""
    scale = 1.0
    for target in (operator.mul, Tensor.to):
        user = next(iter(node.users), None)
        if user is None or len(node.users) > 1 or not called(user, target) or user.args[0] is not node or user.kwargs:
            continue
        if target is operator.mul and type(user.args[1]) in (int, float):
            node, scale = user, float(user.args[1])
        elif target is Tensor.to and len(user.args) == 2 and isinstance(user.args[1], torch.dtype):
            node = user
    return node, scale


def _is_no_op_cast(cast: fx.Node) -> bool:
    new, old = value_of(cast), value_of(cast.args[0])
    return (new.dtype, new.device) == (old.dtype, old.device) and not cast.kwargs


def _is_counter(node: object) -> bool:
    """True for a tensor of one int64, a counter."""
    return _is_int64(node) and shape(node) in [(1,) * n for n in range(9)]


def _are_positions(a: object, b: object) -> bool:
    """True for two counters, or a counter and a vector of positions."""
    if not _is_counter(a):
        a, b = b, a
    return _is_counter(a) and (_is_counter(b) or (_is_int64(b) and rank(b) == 1))


def _is_number(argument: object) -> bool:
    return type(argument) is int or (isinstance(argument, fx.Node) and isinstance(value_of(argument), torch.SymInt))


def _is_native(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    if getattr(node.target, "namespace", None) == "river_native" or node.target in _VIEWS:
        return True
    tensors = any(is_tensor(n) for n in node.all_input_nodes)
    return not tensors and (node.target in _CONSTANTS or isinstance(value_of(node), (int, torch.SymInt)))
