"""The programs of one accelerated model: traced here, read from the compile cache, or specialized from these.

Of the known programs with a call's signature the first one runs that accepts the sizes of its inputs. Not handled, so
traced by Dynamo in every process: growing caches, GPUs, models without identity, and weights that move. Nor are graphs
with inputs other than parameters, fields of the KV cache, arguments of the forward and their sizes.
"""

from __future__ import annotations

import hashlib
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.compile_cache.codec import NotCacheable, dumps, loads
from river_compile.compile_cache.folder import Entry, evict, is_enabled
from river_compile.compile_cache.template import trace_template
from river_compile.config import RiverConfig
from river_compile.kernels.native.build import CannotBuild
from river_compile.passes.decoder import with_size
from river_compile.passes.freeze import size_conditions, to_example
from river_compile.passes.nodes import input_name, is_parameter, value_of
from river_compile.passes.program import Example, Input, Program, Refusal, RiverProgram, Size, Source, TensorSpec
from river_compile.passes.segments import recognise
from river_compile.passes.stamp import stamp
from river_compile.progress import stage_shown
from river_compile.runtime.executor import RiverExecutor
from river_compile.upstream.transformers import is_transformers_model

log = logging.getLogger("river_compile.compile_cache")
_ENDING = ".pass"
Bindable = tuple[RiverExecutor, list[Any]]  # an executor, and the inputs of its program
Origin = Literal["traced", "stamped", "stored", "derived"]
# Builds a program, or a decoder that no pass has seen: (it, the names of its inputs, their values, its origin).
Build = Callable[[Program | RiverProgram, Sequence[str], Sequence[Any], Origin], RiverExecutor]


@dataclass
class _Known:
    program: Program
    executor: Callable[[], RiverExecutor | None]  # returns None before it is built and after Dynamo has dropped it
    traced: RiverProgram | None = None  # the decoder, if Dynamo traced it in this process


class ProgramCache:
    """The programs of one model, compiled with `config`; `on_disk`: shared with other processes."""

    def __init__(self, config: RiverConfig, build: Build, on_disk: bool) -> None:
        self.config = replace(config, twins=None, on_missing_twins="raise")  # programs do not depend on these
        self._build, self._on_disk = build, on_disk
        self._usable = not config.moves_weights
        self._identity: str | None = None
        self._known: dict[str, list[_Known]] = {}  # by signature
        self._new: list[tuple[str, _Known]] = []  # to be written
        self._not_stamped: set[str] = set()  # signatures of passes that a few layers cannot stand for
        self._lock = threading.Lock()  # threads may generate with one model
        self._about = ""

    def begin(self, model: PreTrainedModel, identity: str) -> bool:
        """Begin a call of a model with its present identity; False if its programs cannot be cached."""
        if not (self._usable and model.device.type == "cpu"):
            return False
        with self._lock:
            if identity != self._identity:
                size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
                self._about = f"programs of {type(model).__name__}, {size:.0f}M parameters"
                self._identity, self._known, self._new, self._not_stamped = identity, {}, [], set()
        return True

    def lookup(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        """Return the program for inputs of a model's forward, built; None if there is none."""
        assert self._identity is not None, "begin() found an identity"
        with self._lock:
            try:
                found = self._find(model, inputs, cache) or self._specialize(model, inputs, cache)
                return found or self._stamp(model, inputs, cache)
            except CannotBuild as why:  # the backend reports it
                log.info("known programs are not used: %s", why)
                return None

    def insert(self, inputs: Mapping[str, Any], cache: Cache, executor: RiverExecutor, traced: RiverProgram) -> None:
        """Add a program that Dynamo traced in this call and whose inputs have sources."""
        signature = _signature(inputs, cache)
        if any(known.executor() is executor for known in self._known.get(signature, ())):
            return  # one graph may serve several widths
        with self._lock:
            self._add(signature, executor, weakref.ref(executor), traced)  # Dynamo may drop it

    def write(self) -> None:
        """Write new programs to the compile cache, at the end of a call."""
        with self._lock:
            new, self._new = self._new, []
        entry = None if self._identity is None else self._entry(self._about)
        if entry is None:
            return
        for signature, known in new:
            try:
                content = dumps(known.program)
            except NotCacheable as why:
                log.info("a program is not cached: %s", why)
                continue
            entry.write(f"{signature}-{hashlib.sha256(content).hexdigest()[:16]}{_ENDING}", content)
        if new:
            evict()

    def _find(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        entry, signature = self._entry(), _signature(inputs, cache)
        if signature not in self._known:
            read = [] if entry is None else _read_programs(entry, signature)
            self._known[signature] = [_Known(program, lambda: None) for program in read]
        for known in self._known[signature]:
            args = gather_inputs(known.program.inputs, known.program.conditions, model, inputs, cache)
            if args is None:
                continue
            executor = known.executor()
            if executor is None:
                names = [given.name for given in known.program.inputs]
                executor = self._build(known.program, names, args, "stored")
                known.executor = _always(executor)
                if entry is not None:
                    entry.touch()
            return executor, args
        return None

    def _specialize(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        """Build the program for one token from a known one for several; None if that is not possible."""
        if not _is_one_token(inputs) or not is_transformers_model(model):
            return None
        signature = _signature(inputs, cache)
        for known in self._known.get(_signature(inputs, cache, one_token=False), ()):
            one = None if known.traced is None else decode_variant(known.program, known.traced)
            if one is None:
                continue
            args = gather_inputs(one.inputs, one.conditions, model, inputs, cache)
            if args is not None:
                return self._built(one, args, signature, "derived", None)
        return None

    def _stamp(self, model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache) -> Bindable | None:
        """Build the program from a trace of a few layers; None if the whole model must be traced."""
        if not is_transformers_model(model) or torch.is_grad_enabled():
            return None
        signature = _signature(inputs, cache)
        if signature in self._not_stamped:
            return None
        with stage_shown("tracing"):
            found = stamped_program(model, inputs, cache, twins=self.config.packs_twins)
        if isinstance(found, Refusal):
            log.info("all layers of %s are traced: %s", type(model).__name__, found)
            self._not_stamped.add(signature)
            return None
        args = gather_inputs(found.inputs, found.conditions, model, inputs, cache)
        return None if args is None else self._built(found, args, signature, "stamped", found.found)

    def _built(
        self, new: NewProgram, args: list[Any], signature: str, origin: Origin, traced: RiverProgram | None
    ) -> Bindable:
        executor = self._build(new.found, [given.name for given in new.inputs], args, origin)
        executor.locate(new.copy_sources(executor.program))
        self._add(signature, executor, _always(executor), traced)
        return executor, args

    def _add(
        self,
        signature: str,
        executor: RiverExecutor,
        held_by: Callable[[], RiverExecutor | None],
        traced: RiverProgram | None,
    ) -> None:
        known = _Known(executor.program, held_by, traced)
        self._known.setdefault(signature, []).append(known)
        if executor.is_kept:
            self._new.append((signature, known))

    def _entry(self, about: str = "") -> Entry | None:
        """Return the model's entry of the compile cache, None if the cache is off."""
        assert self._identity is not None, "begin() found an identity"
        return Entry(self._identity, about) if self._on_disk and is_enabled() else None


def _always(executor: RiverExecutor) -> Callable[[], RiverExecutor]:
    return lambda: executor


def _read_programs(entry: Entry, signature: str) -> list[Program]:
    found = []
    for name in entry.names(_ENDING):
        content = entry.read(name) if name.startswith(signature) else None
        if content is None:
            continue
        try:
            found.append(loads(content))
        except NotCacheable as why:
            entry.remove_damaged(name, why)
    return found


def _is_one_token(inputs: Mapping[str, Any]) -> bool:
    return bool(inputs["input_ids"].shape[1] == 1)


def _signature(inputs: Mapping[str, Any], cache: Cache, one_token: bool | None = None) -> str:
    """Return a hash of the kinds of inputs, not their sizes; `one_token` overrides that property of theirs."""
    one_token = _is_one_token(inputs) if one_token is None else one_token
    layers = [type(layer).__qualname__ for layer in cache.layers]
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return hashlib.sha256(repr((one_token, argument_kinds(inputs), layers, modes)).encode()).hexdigest()[:24]


def argument_kinds(inputs: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the name and the kind of each argument of a forward: a tensor's dtype and dimensions, other values."""
    # A program reads one tensor for two arguments that were one tensor when it was traced.
    first: dict[int, str] = {}

    def kind(name: str, value: object) -> object:
        if isinstance(value, Tensor):
            return value.dtype, value.dim(), first.setdefault(id(value), name)
        return type(value).__qualname__ if isinstance(value, Cache) else value

    arguments = sorted(((str(name), value) for name, value in named_arguments(inputs)), key=operator.itemgetter(0))
    return tuple((name, str(kind(name, value))) for name, value in arguments)


def named_arguments(inputs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield a forward's arguments by name, those in a dict (masks by kind of attention) by (name, key)."""
    for name, value in inputs.items():
        if type(value) is dict:
            yield from (((name, key), inner) for key, inner in value.items())
        else:
            yield name, value


def with_sources(
    program: Program,
    traced: RiverProgram,
    model: nn.Module,
    args: Sequence[Any],
    inputs: Mapping[str, Any],
    cache: Cache,
    logits: int,
) -> Program:
    """Return a program with the sources of its inputs `args`; raise a NotCacheable if one has none."""
    # `inputs` are the forward's, with the cache among them; `logits` is their index among the program's outputs.
    known = _sources(model, inputs, cache)
    found = tuple(_with_source(given, arg, known) for given, arg in zip(program.inputs, args, strict=True))
    return replace(program, inputs=found, logits=logits, conditions=size_conditions(map(value_of, traced.inputs)))


def _sources(model: nn.Module, inputs: Mapping[str, Any], cache: Cache) -> dict[int, Source]:
    """Return the sources of all tensors that a call of a model may read, by ``id``."""
    known: dict[int, Source] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        known[id(tensor)] = Source("model", name)
    for number, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                known[id(value)] = Source("cache", name, number)
    arguments = ((name, value) for name, value in named_arguments(inputs) if isinstance(value, Tensor))
    return known | {id(value): Source("call", name) for name, value in arguments}


def _with_source(given: Input, arg: Any, known: Mapping[int, Source]) -> Input:
    if isinstance(arg, Tensor) and id(arg) in known:
        return replace(given, source=known[id(arg)])
    if isinstance(arg, int) and given.example is not None and not isinstance(given.example, TensorSpec):
        return replace(given, source=Source("size"))
    raise NotCacheable(f"{given.name} is not a parameter, a field of the KV cache, an argument or a size")


class NewProgram(NamedTuple):
    """A program before any pass, whose inputs have sources."""

    found: RiverProgram
    inputs: tuple[Input, ...]  # with sources
    conditions: tuple[sympy.Basic, ...]
    logits: int | None

    def copy_sources(self, program: Program) -> Program:
        """Return what the passes made of it, with the sources of its inputs."""
        pairs = zip(program.inputs, self.inputs, strict=True)
        inputs = tuple(replace(given, source=known.source) for given, known in pairs)
        return replace(program, inputs=inputs, conditions=self.conditions, logits=self.logits)


def decode_variant(program: Program, traced: RiverProgram) -> NewProgram | None:
    """Return the variant of a program for one token per row; None, with a line in the log, if there is none."""
    length = traced.plan.query_length
    if isinstance(length, int) or not length.node.expr.is_Symbol:
        return None
    symbol = length.node.expr
    try:
        found = recognise(with_size(traced.plan.graph, symbol, 1), twins=False)
    except Exception as error:  # operators may raise anything
        found = Refusal(f"{type(error).__name__}: {error}")
    if isinstance(found, Refusal):
        log.info("the program for several tokens has no variant for one token: %s", found)
        return None
    left = {node.name for node in found.inputs}
    inputs = (given for node, given in zip(traced.inputs, program.inputs, strict=True) if node.name in left)
    assumed = size_conditions(map(value_of, found.inputs))
    conditions = tuple(condition for condition in assumed if symbol not in condition.free_symbols)
    return NewProgram(found, tuple(inputs), conditions, program.logits)


def stamped_program(
    model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache, twins: bool
) -> NewProgram | Refusal:
    """Return the program of a pass, stamped from a trace of a few layers; or why that is not possible."""
    template = trace_template(model, inputs, cache, _sources(model, inputs, cache))
    stamped = template if isinstance(template, Refusal) else stamp(template)
    if isinstance(stamped, Refusal):
        return stamped
    found = recognise(stamped.graph_module, twins)
    if isinstance(found, Refusal):
        return found
    if len(found.returned) != 1:
        return Refusal("the graph returns more than logits")
    located = tuple(
        Input(_name(node, source), to_example(value_of(node)), is_parameter(node), False, source)
        for node, source in zip(found.inputs, stamped.sources, strict=True)
    )
    return NewProgram(found, located, size_conditions(map(value_of, found.inputs)), 0)


def _name(node: fx.Node, source: Source) -> str:
    """Return an input's name as a trace of the whole model has it."""
    if source.kind == "cache":
        return f"['cache'].layers[{source.layer}].{source.name}"
    return source.name if source.kind == "model" else input_name(node)


def gather_inputs(
    located: Sequence[Input],
    conditions: Sequence[sympy.Basic],
    model: nn.Module,
    inputs: Mapping[str, Any],
    cache: Cache,
) -> list[Any] | None:
    """Return a program's inputs, by their sources, for a call of a model; None if their sizes do not match."""
    call, sizes = dict(named_arguments(inputs)), dict[sympy.Symbol, sympy.Integer]()
    args: list[Any] = [None] * len(located)
    numbers: list[int] = []
    for number, given in enumerate(located):
        source = given.source
        assert source is not None, "a cached program has sources"
        if source.kind == "size":
            numbers.append(number)
        elif source.kind == "model":  # its shape and dtype are part of the model's identity
            args[number] = operator.attrgetter(source.name)(model)
        else:
            args[number] = arg = _read_source(source, cache, call)
            if not _matches(given.example, arg, sizes):
                return None
    for number in numbers:
        size = _evaluate(located[number].example, sizes)
        if size is None:
            return None
        args[number] = size
    return args if all(condition.xreplace(sizes) == sympy.true for condition in conditions) else None


def _read_source(source: Source, cache: Cache, call: Mapping[Any, Any]) -> Any:
    """Return a field of the KV cache or an argument, None if it is missing."""
    if source.kind == "cache":
        return getattr(cache.layers[source.layer], source.name, None) if source.layer < len(cache.layers) else None
    return call.get(source.name)


def _evaluate(example: Example, sizes: Mapping[sympy.Symbol, sympy.Integer]) -> int | None:
    if isinstance(example, int):  # static, by Dynamo's analysis
        return example
    assert isinstance(example, sympy.Expr), "a size is a number"
    size = example.xreplace(sizes)
    return int(size) if size.is_Integer else None


def _matches(example: Example, value: Any, sizes: dict[sympy.Symbol, sympy.Integer]) -> bool:
    """True if a tensor or number is like the example; add the values of dynamic sizes to `sizes`."""
    if not isinstance(example, TensorSpec):
        return isinstance(value, int) and example is not None and _size_matches(example, value, sizes)
    if not isinstance(value, Tensor) or (value.dtype, value.device) != (example.dtype, example.device):
        return False
    if value.dim() != len(example.shape) or (value.requires_grad and torch.is_grad_enabled()):
        return False
    pairs = [*zip(example.shape, value.shape, strict=True)]
    # The stride of a dimension of size 1 is arbitrary.
    strides = zip(example.stride, value.stride(), value.shape, strict=True)
    pairs += [(known, stride) for known, stride, size in strides if size != 1]
    return all(_size_matches(known, size, sizes) for known, size in pairs)


def _size_matches(known: Size, size: int, sizes: dict[sympy.Symbol, sympy.Integer]) -> bool:
    if isinstance(known, int):
        return known == size
    if isinstance(known, sympy.Symbol):
        return bool(sizes.setdefault(known, sympy.Integer(size)) == size)
    return bool(known.xreplace(sizes) == size)
