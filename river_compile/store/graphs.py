"""Rewritten programs as bytes, and back.

What is kept of an fx graph: its nodes, and of each node its example value (dtype, device, sizes, strides) and whether
it is a parameter. Sizes that Dynamo took for dynamic are symbols again afterwards, in a ShapeEnv of their own. Of the
traced graph, whose nodes are the names of values, only those stay that segments exchange or that write in place: a
program that was read can run on a CPU, but no pass can change it.

Only bytes that this package wrote may be read: like every pickle they can name any function.

Not handled (a :class:`NotStorable`): graphs with attributes or submodules, such as constants of tensors, and example
values of other kinds.
"""

from __future__ import annotations

import gc
import importlib
import io
import pickle
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import BuiltinFunctionType
from typing import Any, NamedTuple

import sympy
import sympy.tensor.tensor  # (what a sum of symbols imports when the first one is made)
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import _get_qualified_name, map_arg

from river_compile.kernels import ops  # noqa: F401  (registers what programs call)
from river_compile.passes.nodes import hints_of, memory_of, mutated_inputs
from river_compile.passes.program import DecoderPlan, RiverProgram

_STATIC = "_dynamo_static_input_type"


class NotStorable(ValueError):
    """Why a value cannot be written."""


class _Own(NamedTuple):
    """A node of the graph that is being written, by its number."""

    number: int


class _Symbolic(NamedTuple):
    """A dynamic size, and what its symbols were when it was traced."""

    expr: sympy.Expr
    hints: tuple[tuple[sympy.Symbol, int], ...]


_Size = int | _Symbolic


class _Example(NamedTuple):
    """A fake tensor."""

    shape: tuple[_Size, ...]
    stride: tuple[_Size, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class _Reading:
    """The symbols and fake tensors of one value that is being read. Nodes whose examples are alike share them."""

    def __init__(self) -> None:
        self._shapes = ShapeEnv()
        self._mode = FakeTensorMode(shape_env=self._shapes)
        self.owner = nn.Module()
        self.nodes: dict[fx.Graph, list[fx.Node]] = {}
        self._symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self._numbers: dict[sympy.Expr, torch.SymInt] = {}
        self._tensors: dict[_Example, FakeTensor] = {}

    def number(self, size: _Size) -> int | torch.SymInt:
        """Returns the number that an expression of symbols stood for."""
        if isinstance(size, int):
            return size
        made = self._numbers.get(size.expr)
        if made is None:
            hints = dict(size.hints)
            for old in size.expr.free_symbols - self._symbols.keys():
                source = ConstantSource(f"stored_{old}")
                self._symbols[old] = self._shapes.create_symbol(hints[old], source, DimDynamic.DYNAMIC, None)
            hint = int(size.expr.xreplace(hints))
            here = size.expr.xreplace(self._symbols)
            made = self._numbers[size.expr] = self._shapes.create_symintnode(here, hint=hint)
        return made

    def condition(self, expr: sympy.Basic) -> Condition:
        """Returns a condition on numbers that were read before it."""
        return Condition(expr.xreplace(self._symbols))

    def tensor(self, example: _Example) -> FakeTensor:
        made = self._tensors.get(example)
        if made is None:
            shape, stride = (tuple(map(self.number, sizes)) for sizes in (example.shape, example.stride))
            meta = torch.empty_strided(shape, stride, dtype=example.dtype, device="meta")
            meta.requires_grad_(example.requires_grad)
            made = self._tensors[example] = FakeTensor(self._mode, meta, example.device)
        return made


class Condition(NamedTuple):
    """What Dynamo assumed about dynamic sizes: an expression that must be true of them."""

    expr: sympy.Basic

    def holds(self, sizes: Mapping[sympy.Symbol, sympy.Integer]) -> bool:
        """Tells whether it is certain, given the sizes."""
        return bool(self.expr.xreplace(sizes) == sympy.true)


_reading: ContextVar[_Reading] = ContextVar("_reading")


class _Writer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self._numbers: dict[fx.Graph, dict[fx.Node, int]] = {}
        self._traced: set[fx.Graph] = set()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, fx.Graph):
            return _graph, (tuple(map(self._kept, self._nodes(value))), value in self._traced)
        if isinstance(value, RiverProgram) and value.plan.graph not in self._traced:
            self._leave_out_of(value)
        if isinstance(value, DecoderPlan):
            parts = {node: part for node, part in value.part_of.items() if node in self._nodes(value.graph)}
            return DecoderPlan, (value.graph, value.blocks, parts, value.query_length, value.batch, value.token_axis)
        if isinstance(value, fx.Node):
            return _node, (value.graph, self._nodes(value.graph)[value])
        if isinstance(value, FakeTensor):
            shape, stride = (tuple(map(_size, sizes)) for sizes in (value.shape, value.stride()))
            return _fake, (_Example(shape, stride, value.dtype, value.device, value.requires_grad),)
        if isinstance(value, torch.SymInt):
            return _number, (_size(value),)
        if isinstance(value, Condition):
            return _condition, (value.expr,)
        if isinstance(value, OpOverload):
            return _operator, (value._schema.name, value._overloadname)
        if isinstance(value, OpOverloadPacket):
            return _operator, (value._qualified_op_name, None)
        if isinstance(value, BuiltinFunctionType) and value.__module__ != "builtins":
            return _function, (_find_name(value),)
        if isinstance(value, (Tensor, nn.Module)):
            raise NotStorable(f"a {type(value).__name__} is no part of a program")
        return NotImplemented

    def _leave_out_of(self, program: RiverProgram) -> None:
        """Leaves out of the traced graph of a program what nobody reads once it was rewritten."""
        plan = program.plan
        kept = {*program.slots, *program.returned, plan.graph.output_node()}
        for block in plan.blocks:
            kept |= {block.hidden_in, block.hidden_out, *block.kv.writes, *block.kv.lengths}
        for writer in filter(mutated_inputs, plan.graph.nodes):
            kept |= {writer, *writer.all_input_nodes, *map(memory_of, mutated_inputs(writer))}
        numbered = enumerate(node for node in plan.graph.nodes if node in kept)
        self._numbers[plan.graph] = {node: number for number, node in numbered}
        self._traced.add(plan.graph)

    def _nodes(self, graph: fx.Graph) -> dict[fx.Node, int]:
        """Returns a graph's nodes with their numbers."""
        if graph not in self._numbers:
            self._numbers[graph] = {node: number for number, node in enumerate(graph.nodes)}
        return self._numbers[graph]

    def _kept(self, node: fx.Node) -> tuple:
        if node.op in ("get_attr", "call_module"):
            raise NotStorable(f"{node.name} reads {node.target}")
        numbers = self._nodes(node.graph)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Own(numbers[n]) if n in numbers else None)
        static = _STATIC in node.meta.get("tensor_dict", {})
        return node.op, node.target, args, dict(kwargs), node.name, node.meta.get("example_value"), static


def _graph(kept: tuple, traced: bool) -> fx.Graph:
    """Makes a graph anew; a traced one is not compiled, so its inputs may share their examples."""
    reading = _reading.get()
    graph = fx.Graph(owning_module=reading.owner)
    nodes = reading.nodes[graph] = []
    for op, target, args, kwargs, name, example, static in kept:
        node = graph.create_node(op, target, _with_nodes(args, nodes), _with_nodes(kwargs, nodes), name)
        if example is not None:
            node.meta["example_value"] = _own(example) if op == "placeholder" and not traced else example
        if static:
            node.meta["tensor_dict"] = {_STATIC: "unguarded"}
        nodes.append(node)
    return graph


def _own(example: Any) -> Any:
    """Returns an example of an input, which is another tensor than those of all others: else they count as one."""
    if not isinstance(example, FakeTensor):
        return example
    meta = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device="meta")
    meta.requires_grad_(example.requires_grad)
    return FakeTensor(example.fake_mode, meta, example.device)


def _with_nodes(value: Any, nodes: list[fx.Node]) -> Any:
    if isinstance(value, _Own):
        return nodes[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(_with_nodes(item, nodes) for item in value)
    if isinstance(value, slice):
        return slice(*(_with_nodes(item, nodes) for item in (value.start, value.stop, value.step)))
    return {key: _with_nodes(item, nodes) for key, item in value.items()} if isinstance(value, dict) else value


def _node(graph: fx.Graph, number: int) -> fx.Node:
    return _reading.get().nodes[graph][number]


def _size(size: int | torch.SymInt) -> _Size:
    if isinstance(size, int):
        return size
    expr, shapes = size.node.expr, size.node.shape_env
    known = hints_of(shapes)
    hints = ((symbol, int(known[symbol])) for symbol in sorted(expr.free_symbols, key=str))
    return _Symbolic(expr, tuple(hints)) if expr.free_symbols else int(expr)


def _fake(example: _Example) -> FakeTensor:
    return _reading.get().tensor(example)


def _number(size: _Size) -> int | torch.SymInt:
    return _reading.get().number(size)


def _condition(expr: sympy.Basic) -> Condition:
    return _reading.get().condition(expr)


def _operator(name: str, overload: str | None) -> OpOverload | OpOverloadPacket:
    namespace, _, short = name.partition("::")
    try:
        packet: OpOverloadPacket = getattr(getattr(torch.ops, namespace), short)
    except AttributeError as error:
        raise NotStorable(f"nobody has registered {name} in this process") from error
    return packet if overload is None else getattr(packet, overload or "default")


def _find_name(function: BuiltinFunctionType) -> str:
    """Returns where a function of an extension module is found. (Pickle knows some of them by no name.)"""
    name = _get_qualified_name(function)
    if _function(name) is not function:
        raise NotStorable(f"{name} is another function than {function!r}")
    return name


def _function(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def dumps(value: object) -> bytes:
    """Returns a program, or whatever holds programs, as bytes.

    Raises:
        NotStorable: (a ``ValueError``) something in it cannot be written.
    """
    file = io.BytesIO()
    try:
        _Writer(file).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise NotStorable(str(error)) from error
    return file.getvalue()


def conditions_on(values: Iterable[object]) -> tuple[Condition, ...]:
    """Returns what was assumed so far about the dynamic sizes of a graph, given the example values of its inputs.

    The range of a number that no input has (a capacity that only Python reads) is no matter of the graph's.
    """
    found = (size for value in values for size in (value.shape if isinstance(value, Tensor) else (value,)))
    sizes = [size.node for size in found if isinstance(size, torch.SymInt)]
    if not sizes:
        return ()
    shapes, known = sizes[0].shape_env, {symbol for size in sizes for symbol in size.expr.free_symbols}
    assumed = [shapes.replace(guard.expr) for guard in shapes.guards]
    for symbol, bounds in shapes.var_to_range.items():
        here = shapes.replace(symbol)
        if not known.issuperset(here.free_symbols):
            continue
        assumed += [sympy.Ge(here, bounds.lower)] if bounds.lower.is_Integer else []
        assumed += [sympy.Le(here, bounds.upper)] if bounds.upper.is_Integer else []
    return tuple(Condition(expr) for expr in dict.fromkeys(assumed) if expr != sympy.true)


def loads(data: bytes) -> Any:
    """Returns what was written; with symbols and fake tensors that belong to nothing else.

    Raises:
        NotStorable: (a ``ValueError``) an operator in it is missing in this process.
        Exception: whatever damaged bytes lead to.
    """
    token, collects = _reading.set(_Reading()), gc.isenabled()
    gc.disable()  # (thousands of new nodes make it look at all that torch imports, which takes longer than they do)
    try:
        return pickle.loads(data)
    finally:
        _reading.reset(token)
        if collects:
            gc.enable()
