"""Programs as JSON: numbers, names and the operators of their graphs.

Not handled (a :class:`NotCacheable`): graphs with attributes or submodules, and inputs without an example.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import json
import keyword
import operator
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import sympy
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx.node import _get_qualified_name
from torch.utils._sympy import functions as sizes

from river_compile.kernels import cache_ops, ops  # noqa: F401  (registers what programs call)
from river_compile.kernels.native.load import load
from river_compile.passes import program as values
from river_compile.passes.program import Code, Input, Program

_TYPES: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Program, Input, Code, values.SegmentSpec, values.Source, values.TensorSpec, values.CacheRoom),
        *(values.LastToken, values.Fingerprint, values.Matmul, values.Refusal, values.KeptLinear, values.Fusion),
    )
}
# Expressions of sizes, and conditions on them.
_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy, name)
    for name in ("Add", "Mul", "Pow", "Max", "Min", "Eq", "Ne", "Ge", "Gt", "Le", "Lt", "And", "Or", "Not")
} | {
    name: getattr(sizes, name)
    for name in ("FloorDiv", "Mod", "PythonMod", "ModularIndexing", "CleanDiv", "CeilToInt", "Max", "Min")
    if hasattr(sizes, name)
}
_CONDITIONS = (sympy.Eq, sympy.Ne, sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)
_ANY = "Integer"  # the mark of a symbol of any sign
_NAMES = {kind: name for name, kind in _EXPRESSIONS.items()} | {
    sympy.Equality: "Eq",
    sympy.Unequality: "Ne",
    sympy.GreaterThan: "Ge",
    sympy.StrictGreaterThan: "Gt",
    sympy.LessThan: "Le",
    sympy.StrictLessThan: "Lt",
}
# Modules whose functions traced models call. Any other name in a file is an error, so a damaged or foreign file runs no
# code. Of `torch` itself only functions of its extension module are allowed, so `torch.load` is not.
_MODULES = (
    *("torch", "torch.functional", "torch.nn.functional", "torch._C._nn", "torch._C._special", "torch._C._fft"),
    *("torch._C._linalg", "torch._tensor", "torch.amp.autocast_mode", "torch.fx.experimental.symbolic_shapes"),
    *("torch._C", "torch.special", "torch.linalg", "torch.fft", "_operator", "operator", "math"),
    *("river_compile.kernels.portable", "river_compile.passes.experts"),
)
# What nodes of a graph take, apart from containers.
_ARGUMENTS = (
    *(bool, int, float, str, type(Ellipsis), fx.Node),
    *(torch.dtype, torch.memory_format, torch.layout, torch.device),
)
_BUILTINS = ("abs", "float", "getattr", "int", "len", "max", "min", "round", "slice")


class NotCacheable(ValueError):
    """A value cannot be written, or the content of a file is no program."""


def dumps(program: Program) -> bytes:
    """Serialize a program; raise a NotCacheable if a part of it cannot be written."""
    if any(given.example is None for given in program.inputs):
        name = next(given.name for given in program.inputs if given.example is None)
        raise NotCacheable(f"{name} is neither an ordinary tensor nor an integer")
    writer = _Writer()
    content = writer.write(program)
    return json.dumps({"codes": writer.codes, "program": content}, separators=(",", ":")).encode()


def loads(data: bytes) -> Program:
    """Deserialize a program; raise a NotCacheable for other content and for missing functions."""
    try:
        content = json.loads(data)
        reader = _Reader()
        for code in content["codes"]:
            reader.codes.append(reader.read(code))
        program = reader.read(content["program"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, SyntaxError, ArithmeticError) as error:
        raise NotCacheable(f"{type(error).__name__}: {error}") from error
    if not isinstance(program, Program):
        raise NotCacheable(f"it is a {type(program).__name__}, not a program")
    return program


class _Writer:
    """Turns values into JSON; a code that segments share is written once."""

    def __init__(self) -> None:
        self.codes: list[Any] = []
        self._known: dict[Code, int] = {}
        self._nodes: dict[fx.Node, int] = {}

    def write(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, str)) or type(value) in (int, float):
            return value
        if isinstance(value, Code):
            if value not in self._known:
                written = self._dataclass(value)
                self._known[value] = len(self.codes)
                self.codes.append(written)
            return {"code": self._known[value]}
        if is_dataclass(value) and type(value).__name__ in _TYPES:
            return self._dataclass(value)
        if isinstance(value, fx.GraphModule):
            return {"graph": self._graph(value.graph)}
        if isinstance(value, fx.Node):
            return {"node": self._nodes[value]}
        if isinstance(value, (tuple, list)):
            return {"tuple" if isinstance(value, tuple) else "list": list(map(self.write, value))}
        if isinstance(value, dict):
            return {"dict": [[self.write(key), self.write(item)] for key, item in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self.write(bound) for bound in (value.start, value.stop, value.step)]}
        if isinstance(value, sympy.Basic):
            return {"size": _write_size(value)}
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if value is Ellipsis:
            return {"ellipsis": True}
        raise NotCacheable(f"a {type(value).__name__} cannot be part of a program")

    def _dataclass(self, value: Any) -> dict[str, Any]:
        held = {field.name: self.write(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, **held}

    def _graph(self, graph: fx.Graph) -> list[Any]:
        written = []
        for number, node in enumerate(graph.nodes):
            if node.op in ("get_attr", "call_module"):
                raise NotCacheable(f"{node.name} reads {node.target}")
            target = node.target if isinstance(node.target, str) else _name_of(node.target)
            written.append([node.op, target, self.write(node.args), self.write(dict(node.kwargs)), node.name])
            self._nodes[node] = number
        return written


class _Reader:
    """Builds values from the JSON of a `_Writer`."""

    def __init__(self) -> None:
        self.codes: list[Any] = []
        self._nodes: list[fx.Node] = []

    def read(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "type" in value:
            kind = _TYPES[value["type"]]
            held = {name: self.read(item) for name, item in value.items() if name != "type"}
            for name, hint in _hints(kind).items():
                if not _is_a(held[name], hint):
                    raise NotCacheable(f"{kind.__name__}.{name} is {held[name]!r:.60}, not a {hint}")
            return kind(**held)
        ((kind, held),) = value.items()
        readers: dict[str, Callable[[Any], Any]] = {
            "code": lambda held: self.codes[held],
            "graph": self._graph,
            "node": lambda held: self._nodes[held],
            "tuple": lambda held: tuple(map(self.read, held)),
            "list": lambda held: list(map(self.read, held)),
            "dict": lambda held: {self.read(key): self.read(item) for key, item in held},
            "slice": lambda held: slice(*map(self.read, held)),
            "size": _read_size,
            "torch": _torch_constant,
            "device": torch.device,
            "ellipsis": lambda held: Ellipsis,
        }
        return readers[kind](held)

    def _graph(self, written: list[Any]) -> fx.GraphModule:
        graph = fx.Graph()
        self._nodes = []
        for op, target, args, kwargs, name in written:
            if op == "call_function":
                target = _function(target)
            elif op not in ("placeholder", "output", "call_method") or (
                op == "call_method" and not hasattr(Tensor, target)
            ):
                raise NotCacheable(f"{op} {target} cannot be part of a program")
            given = self.read(args), self.read(kwargs)
            if tuple(map(type, given)) != (tuple, dict):
                raise NotCacheable(f"{name!r:.60} has no arguments")
            _check_arguments(given)
            _check_identifiers(name, *given[1], *([] if op == "call_function" else [target]))
            self._nodes.append(graph.create_node(op, target, *given, name))
        return fx.GraphModule(nn.Module(), graph, class_name="Segment")


def _check_identifiers(*names: Any) -> None:
    """Raise a NotCacheable for what is no Python identifier: these become the text of generated code as they are."""
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise NotCacheable(f"{name!r:.60} is not a name in a program")


def _check_arguments(value: Any) -> None:
    """Raise a NotCacheable for an argument whose text in generated code is not that of the value."""
    if isinstance(value, (tuple, list)):
        for each in value:
            _check_arguments(each)
    elif isinstance(value, dict):
        _check_arguments([*value, *value.values()])
    elif isinstance(value, slice):
        _check_arguments([value.start, value.stop, value.step])
    elif value is not None and not isinstance(value, _ARGUMENTS):
        raise NotCacheable(f"a {type(value).__name__} cannot be an argument in a program")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value read from a file has the annotated type of its field."""
    kind, of = get_origin(hint), get_args(hint)
    if kind is Literal:
        return value in of
    if kind in (Union, UnionType):
        return any(_is_a(value, each) for each in of)
    if kind is tuple:
        same = of[-1] is Ellipsis
        pairs = zip(value, of[:1] * len(value) if same else of, strict=False) if isinstance(value, tuple) else ()
        return isinstance(value, tuple) and (same or len(value) == len(of)) and all(_is_a(*pair) for pair in pairs)
    return hint is Any or isinstance(value, hint)


def _write_size(value: sympy.Basic) -> Any:
    if isinstance(value, sympy.Symbol):
        return value.name if value.is_positive else [_ANY, value.name]
    if value in (sympy.true, sympy.false):
        return bool(value)
    if isinstance(value, sympy.Integer):
        return int(value)
    name = _NAMES.get(type(value))
    if name is None:
        raise NotCacheable(f"the size {value} is a {type(value).__name__}, which is not supported")
    return [name, *map(_write_size, value.args)]


def _read_size(held: Any) -> sympy.Basic:
    if isinstance(held, str):
        return _symbol(held, positive=True)
    if isinstance(held, bool):
        return sympy.true if held else sympy.false
    if isinstance(held, int):
        return sympy.Integer(held)
    name, *arguments = held
    if name == _ANY:  # not known to be positive, as a negative offset
        return _symbol(arguments[0])
    kind, operands = _EXPRESSIONS[name], [_read_size(argument) for argument in arguments]
    # They were evaluated when they were written, and SymPy imports its tensors to compare symbols.
    made: sympy.Basic = kind(*operands, evaluate=False) if kind in _CONDITIONS else kind(*operands)
    return made


def _symbol(name: Any, **known: bool) -> sympy.Symbol:
    _check_identifiers(name)
    return sympy.Symbol(name, integer=True, **known)


def _torch_constant(name: str) -> Any:
    found = getattr(torch, name)
    if not isinstance(found, (torch.dtype, torch.memory_format, torch.layout)):
        raise NotCacheable(f"torch.{name} is not a dtype, layout or memory format")
    return found


def _name_of(target: Any) -> str:
    if isinstance(target, OpOverload):
        return f"{target._schema.name}::{target._overloadname}"
    if isinstance(target, OpOverloadPacket):
        return f"{target._qualified_op_name}::"
    name = getattr(target, "__name__", "")
    name = f"torch.Tensor.{name}" if getattr(Tensor, name, None) is target else _get_qualified_name(target)
    if _function(name) is not target:
        raise NotCacheable(f"{name} is not the name of {target!r}")
    return name


def _function(name: str) -> Any:
    if "::" in name:
        space, short, overload = name.split("::")
        if space == "river_native":  # registered with the library, which a new process has not loaded yet
            load()
        packet: OpOverloadPacket = getattr(getattr(torch.ops, space), short)
        return getattr(packet, overload) if overload else packet
    module, _, attribute = name.rpartition(".")
    if not module and attribute in _BUILTINS:
        return getattr(builtins, attribute)
    if module == "torch.Tensor":
        return getattr(Tensor, attribute)
    if name == "torch.Size":  # the one type: GPT-2 makes shapes with it
        return torch.Size
    if module not in _MODULES:
        raise NotCacheable(f"{name} is not a function that programs call")
    function = operator.attrgetter(attribute)(importlib.import_module(module))
    own = module not in ("torch", "torch._C") or not hasattr(function, "__code__") or attribute.startswith("sym_")
    if isinstance(function, type) or not callable(function) or not own:
        raise NotCacheable(f"{name} is not a function that programs call")
    return function
