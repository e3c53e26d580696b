"""Queries on nodes of a graph in the normal form (`normalize.py`). They change no graph and add no guard.

Not handled: graphs as Dynamo traces them, where one operation has many spellings.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import Argument
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
_NESTING = {"_enter_autocast": 1, "_vmap_increment_nesting": 1, "_exit_autocast": -1, "_vmap_decrement_nesting": -1}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_RESHAPES = (torch.reshape, Tensor.view, torch.flatten, torch.unsqueeze, torch.squeeze)
# Functions with an `inplace` flag, which is the last argument in the normal form.
WITH_INPLACE = tuple(
    f for f in vars(F).values() if inspect.isfunction(f) and "inplace" in inspect.signature(f).parameters
)
_IN_PLACE_OPERATORS = (
    *(operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)


def value_of(node: fx.Node) -> Any:
    """Return the fake tensor or number that Dynamo recorded, None if it recorded none."""
    return node.meta.get("example_value")


def hints_of(shapes: ShapeEnv) -> Mapping[sympy.Symbol, int]:
    """Return the values of dynamic sizes at trace time."""
    # `var_to_val` is the name up to torch 2.12.
    known: Mapping[sympy.Symbol, int] = getattr(shapes, "backed_var_to_val", None) or shapes.var_to_val
    return known


def is_tensor(node: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and isinstance(value_of(node), Tensor)


def is_hidden(node: fx.Node) -> bool:
    """Whether a node has the form of a hidden state: floating, ``[B, T, D]``."""
    return rank(node) == 3 and value_of(node).is_floating_point()


def is_streams(node: fx.Node) -> bool:
    """Whether a node has the form of several hidden states in one tensor: floating, four dimensions."""
    return rank(node) == 4 and value_of(node).is_floating_point()


def is_parameter(node: object, dims: int | None = None) -> TypeGuard[fx.Node]:
    """Whether a node is a placeholder of a module's parameter or buffer (of `dims` dimensions)."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    # transformers marks a static KV cache like a parameter, but a graph writes that in place.
    marked = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") == "unguarded"
    return marked and dims in (None, rank(node)) and not any(node in mutated_inputs(user) for user in node.users)


def is_ordinary(tensor: object) -> bool:
    """Whether a tensor, real or fake, wraps no others (torchao's quantized tensors do)."""
    return type(tensor) in (Tensor, torch.nn.Parameter) or not is_traceable_wrapper_subclass(tensor)


def input_name(node: fx.Node) -> str:
    """Return a graph input's name in the user's code: ``model.layers.0.mlp.experts.gate_up_proj``."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:  # Dynamo drops it when the graph is compiled
        return re.sub(r"_(?:modules|parameters|buffers)_", ".", node.name.strip("_")).removeprefix("l_self.")
    name = source.name() if callable(source.name) else source.name  # a method up to torch 2.12
    return clean_path(re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", name))


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a node writes in place: by its operator's schema, its name, or ``out=``."""
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, node.args, strict=False)} | node.kwargs
        written = [given.get(a.name) for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    else:
        written = [*(node.args[:1] if _writes_first(node) else ()), node.kwargs.get("out")]
    values = (n for value in written for n in (value if isinstance(value, (tuple, list)) else (value,)))
    return [n for n in values if isinstance(n, fx.Node)]


def _writes_first(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.target in _IN_PLACE_OPERATORS:  # `n += 1` of a number makes another number
        return isinstance(node.args[0], fx.Node) and not isinstance(value_of(node.args[0]), (int, float, torch.SymInt))
    trailing = name.endswith("_") and not name.endswith("__")
    return trailing or node.target is operator.setitem or (node.target in WITH_INPLACE and node.args[-1] is True)


def memory_of(node: fx.Node) -> fx.Node:
    """Follow views and in-place writes back to the value whose memory a node shares, or may share."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node) and _shows_first(node.target):
        node = node.args[0]
    return node


@functools.cache
def _shows_first(function: Callable) -> bool:
    """Whether a result may share memory with the first argument, by all schemas of the function's name."""
    if function in (operator.getitem, getattr, F.dropout, *_IN_PLACE_OPERATORS):
        return True
    if isinstance(function, torch._ops.OpOverload):
        return _shows(function._schema)
    packet = getattr(torch.ops.aten, getattr(function, "__name__", ""), None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):  # `__eq__` is a method of torch.ops.aten itself
        return False
    return any(_shows(getattr(packet, name)._schema) for name in packet.overloads())


def _shows(schema: torch.FunctionSchema) -> bool:
    if not schema.arguments or schema.arguments[0].alias_info is None:
        return False
    memory = schema.arguments[0].alias_info
    pieces = "*" in memory.after_set  # split and chunk return views of parts
    return pieces or any(
        r.alias_info is not None and r.alias_info.after_set & memory.before_set for r in schema.returns
    )


def calls_flex_attention(nodes: Iterable[fx.Node]) -> bool:
    return any(called(node, torch.ops.higher_order.flex_attention) for node in nodes)


def nesting(node: fx.Node) -> int:
    """Return 1 if a node enters an autocast or a ``vmap``, -1 if it leaves one, else 0."""
    return _NESTING.get(getattr(node.target, "__name__", ""), 0)


def rank(node: object) -> int | None:
    return value_of(node).dim() if is_tensor(node) else None


def shape(node: fx.Node) -> tuple[int | str, ...]:
    """Return a tensor's sizes, dynamic ones as text, since comparing text adds no guard."""
    return sizes_of(value_of(node))


def sizes_of(value: Tensor) -> tuple[int | str, ...]:
    known = [n if isinstance(n, int) else n.node.maybe_as_int() for n in value.shape]
    return tuple(str(n) if fixed is None else fixed for n, fixed in zip(value.shape, known, strict=True))


def closure(nodes: Iterable[fx.Node], neighbors: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(neighbors(node))
    return found


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return closure(nodes, lambda node: node.all_input_nodes)


def external_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Return the other nodes that `nodes` read, in order of appearance."""
    inside = set(nodes)
    return list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))


def module_path(node: fx.Node) -> str:
    """Return the path of the innermost module that a node was traced in, "" if there is none."""
    stack = node.meta.get("nn_module_stack")
    return clean_path(list(stack.values())[-1][0]) if stack else ""


def clean_path(path: str) -> str:
    """Strip the root from a path of Dynamo's: ``L['self'].model.layers.5`` becomes ``model.layers.5``."""
    return re.sub(r"^L\[[^\]]*\](\[\d+\])?(\._modules\[[^\]]*\])*\.?", "", path)


def source_of(node: fx.Node) -> str:
    """Return a node's name and source line: ``add_, cache_utils.py:483``."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return node.name
    file, line = frames[-1]
    return f"{node.name}, {file.rpartition('/')[2]}:{line}"


def called(node: Argument, *functions: Callable) -> TypeGuard[fx.Node]:
    """Whether a node calls one of these functions."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in functions


def operands(node: Argument, *functions: Callable) -> tuple[Argument, Argument] | None:
    return node.args if called(node, *functions) and len(node.args) == 2 and not node.kwargs else None


def either_way(node: Argument, function: Callable) -> Iterator[tuple[Argument, Argument]]:
    """Yield the operands of a commutative operation in both orders."""
    found = operands(node, function)
    if found:
        yield found
        yield found[::-1]


def other_operand(node: Argument, function: Callable, number: float) -> Argument | None:
    """Return x of ``function(x, number)`` or ``function(number, x)``, None for other nodes."""
    return next((other for value, other in either_way(node, function) if value == number), None)


def skip_casts(node: Argument) -> Argument:
    """Skip casts between floating dtypes."""
    while _is_cast(node):
        node = node.args[0]
    return node


def _is_cast(node: Argument) -> TypeGuard[fx.Node]:
    if not called(node, Tensor.to) or not is_tensor(node):
        return False
    new, old = value_of(node), value_of(node.args[0])
    return new.is_floating_point() and old.is_floating_point() and new.device == old.device


def skip_noops(node: Argument) -> Argument:
    """Skip operations that change no value: dropout at inference, casts to the same dtype, ``x[:]``."""
    while (
        called(node, Tensor.contiguous)
        or (called(node, F.dropout) and node.args[2] is False)
        or (_is_cast(node) and same_dtype(node, node.args[0]))
        or (called(node, operator.getitem) and _takes_all(node))
    ):
        node = node.args[0]
    return node


def same_dtype(a: Argument, b: Argument) -> bool:
    return is_tensor(a) and is_tensor(b) and value_of(a).dtype == value_of(b).dtype


def same_size(a: Argument, b: Argument) -> bool:
    return same_dtype(a, b) and shape(a) == shape(b)


def only_used_for(node: fx.Node, end: fx.Node) -> bool:
    """Whether every use of a value leads to `end`, through operations without side effects."""
    return bool(node.users) and all(
        user is end or (user.op != "output" and not mutated_inputs(user) and only_used_for(user, end))
        for user in node.users
    )


def _takes_all(node: fx.Node) -> bool:
    source, index = node.args
    index = index if isinstance(index, tuple) else (index,)
    slices = all(isinstance(i, slice) or i is Ellipsis for i in index)
    return slices and is_tensor(source) and is_tensor(node) and shape(node) == shape(source)


def skip_views(node: Argument) -> Argument:
    """Skip no-ops and views that keep the order of the elements."""
    while _keeps_order(node := skip_noops(node)):
        node = node.args[0]
    return node


def is_reshape(node: Argument) -> TypeGuard[fx.Node]:
    """Whether a node changes the shape only: neither the order of elements nor the dtype."""
    return called(node, *_RESHAPES) and same_dtype(node, node.args[0])


def _keeps_order(node: Argument) -> TypeGuard[fx.Node]:
    if not called(node, torch.transpose, torch.permute):
        return is_reshape(node)
    x, *moves = node.args
    order = list(range(value_of(x).dim()))
    if node.target is torch.transpose:
        order[moves[0]], order[moves[1]] = order[moves[1]], order[moves[0]]
    else:
        order = [order[d] for d in moves[0]]
    moved = [d for d in order if shape(x)[d] != 1]
    return moved == sorted(moved)


@dataclass(frozen=True)
class Linear:
    """A linear layer, ``x W^T + bias``."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool  # the weight is stored as [K, N] (GPT-2's Conv1D)

    @property
    def name(self) -> str:
        return module_path(self.node) or self.weight.name

    @property
    def in_features(self) -> int:
        return value_of(self.weight).shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return value_of(self.weight).shape[1 if self.transposed else 0]


def as_linear(node: fx.Node) -> Linear | None:
    """Recognize a linear layer of parameters: ``F.linear``, ``addmm``, ``x @ weight.T`` (Falcon)."""
    bias = None
    if called(node, F.linear) and len(node.args) == 3:
        x, weight, bias = node.args
    elif called(node, torch.addmm) and len(node.args) == 3 and not node.kwargs:
        bias, x, weight = node.args
    elif called(node, operator.matmul) and called(node.args[1], torch.t):
        x, weight = node.args[0], node.args[1].args[0]
    else:
        return None
    if not is_parameter(weight, dims=2) or not (bias is None or is_parameter(bias, dims=1)):
        return None
    return Linear(node, x, weight, bias, transposed=node.target is torch.addmm)


@dataclass(frozen=True)
class Sdpa:
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    dropout: float
    causal: bool
    scale: float | None
    enable_gqa: bool


def as_sdpa(node: fx.Node) -> Sdpa | None:
    if node.target is not F.scaled_dot_product_attention or len(node.args) != 6:
        return None
    return Sdpa(*node.args, **node.kwargs)


def inference_sdpa(node: Argument) -> Sdpa | None:
    """Recognize attention over heads ``[B, H, T, D]`` without dropout."""
    found = as_sdpa(node) if isinstance(node, fx.Node) else None
    return found if found and not found.dropout and rank(found.q) == 4 else None
