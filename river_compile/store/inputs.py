"""Where the inputs of a program come from, and their values for a call of a model.

Dynamo gathers a graph's inputs by code that it generates. Here each of them has a :class:`Source`: a parameter by its
path, a field of a layer of the KV cache, an argument of the model's forward by its name, or a size of one of these.

Not handled (a :class:`NotStorable`): graphs with inputs from elsewhere.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from river_compile.passes.decoder import with_size
from river_compile.passes.freeze import size_conditions
from river_compile.passes.nodes import value_of
from river_compile.passes.program import Example, Input, Program, Refusal, RiverProgram, Size, Source, TensorSpec
from river_compile.passes.segments import recognise
from river_compile.store.codec import NotStorable

log = logging.getLogger("river_compile.store")


def named(inputs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields a forward's arguments with their names, those in a dict (masks by kind of attention) one by one."""
    for name, value in inputs.items():
        if type(value) is dict:
            yield from (((name, key), inner) for key, inner in value.items())
        else:
            yield name, value


def located(
    program: Program,
    traced: RiverProgram,
    model: nn.Module,
    args: Sequence[Any],
    inputs: Mapping[str, Any],
    cache: Cache,
    logits: int,
) -> Program:
    """Returns a program that knows where its inputs come from.

    Args:
        program: of a pass that ran.
        traced: the decoder that it was made of.
        model: the model.
        args: the program's inputs.
        inputs: those of the model's forward, by name; the cache is among them.
        cache: the KV cache.
        logits: which of the program's outputs are the logits.

    Raises:
        NotStorable: (a ``ValueError``) it is not known where an input came from.
    """
    known: dict[int, Source] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        known[id(tensor)] = Source("model", name)
    for number, layer in enumerate(cache.layers):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                known[id(value)] = Source("cache", name, number)
    known |= {id(value): Source("call", name) for name, value in named(inputs) if isinstance(value, Tensor)}
    found = tuple(_with_source(given, arg, known) for given, arg in zip(program.inputs, args, strict=True))
    return replace(program, inputs=found, logits=logits, conditions=size_conditions(map(value_of, traced.inputs)))


def _with_source(given: Input, arg: Any, known: Mapping[int, Source]) -> Input:
    if isinstance(arg, Tensor) and id(arg) in known:
        return replace(given, source=known[id(arg)])
    if isinstance(arg, int) and given.example is not None and not isinstance(given.example, TensorSpec):
        return replace(given, source=Source("size"))
    raise NotStorable(f"it is not known where {given.name} comes from")


class OneToken(NamedTuple):
    """A pass of one token in each row that follows from one of several, before it is rewritten; see `located`."""

    found: RiverProgram
    inputs: tuple[Input, ...]
    conditions: tuple[sympy.Basic, ...]
    logits: int | None

    def locate(self, program: Program) -> Program:
        """Returns the program that it became with the sources of its inputs."""
        pairs = zip(program.inputs, self.inputs, strict=True)
        inputs = tuple(replace(given, source=known.source) for given, known in pairs)
        return replace(program, inputs=inputs, conditions=self.conditions, logits=self.logits)


def of_one_token(program: Program, traced: RiverProgram) -> OneToken | None:
    """Returns the pass of one token in each row that follows from one of several; None, and a line in the log, where
    none follows."""
    length = traced.plan.query_length
    if isinstance(length, int) or not length.node.expr.is_Symbol:
        return None
    symbol = length.node.expr
    try:
        found = recognise(with_size(traced.plan.graph, symbol, 1), twins=False)
    except Exception as error:  # (whatever operators raise)
        found = Refusal(f"{type(error).__name__}: {error}")
    if isinstance(found, Refusal):
        log.info("no pass of one token follows from one of several: %s", found)
        return None
    left = {node.name for node in found.inputs}
    inputs = (given for node, given in zip(traced.inputs, program.inputs, strict=True) if node.name in left)
    assumed = size_conditions(map(value_of, found.inputs))
    conditions = tuple(condition for condition in assumed if symbol not in condition.free_symbols)
    return OneToken(found, tuple(inputs), conditions, program.logits)


def arguments(program: Program, model: nn.Module, inputs: Mapping[str, Any], cache: Cache) -> list[Any] | None:
    """Returns a program's inputs for a call of a model, None if it is not for such inputs.

    Args:
        program: with known sources.
        model: the model, of the same identity.
        inputs: of its forward, by name.
        cache: the KV cache among them.
    """
    call, sizes = dict(named(inputs)), dict[sympy.Symbol, sympy.Integer]()
    args: list[Any] = [None] * len(program.inputs)
    numbers: list[int] = []
    for number, given in enumerate(program.inputs):
        source = given.source
        assert source is not None, "a program that is kept knows its sources"
        if source.kind == "size":
            numbers.append(number)
        elif source.kind == "model":  # (which is what it was, as the model's identity is)
            args[number] = operator.attrgetter(source.name)(model)
        else:
            args[number] = arg = _read(source, cache, call)
            if not _fits(given.example, arg, sizes):
                return None
    for number in numbers:
        size = _size_at(program.inputs[number].example, sizes)
        if size is None:
            return None
        args[number] = size
    return args if all(condition.xreplace(sizes) == sympy.true for condition in program.conditions) else None


def _read(source: Source, cache: Cache, call: Mapping[Any, Any]) -> Any:
    """Returns an input that is no parameter, None where there is none."""
    if source.kind == "cache":
        return getattr(cache.layers[source.layer], source.name, None) if source.layer < len(cache.layers) else None
    return call.get(source.name)


def _size_at(example: Example, sizes: Mapping[sympy.Symbol, sympy.Integer]) -> int | None:
    if isinstance(example, int):  # (Dynamo found that it is always the same)
        return example
    assert isinstance(example, sympy.Expr), "a size is a number"
    size = example.xreplace(sizes)
    return int(size) if size.is_Integer else None


def _fits(example: Example, value: Any, sizes: dict[sympy.Symbol, sympy.Integer]) -> bool:
    """Tells whether a tensor or number is like the example, and notes what the dynamic sizes are."""
    if not isinstance(example, TensorSpec):
        return isinstance(value, int) and example is not None and _same(example, value, sizes)
    if not isinstance(value, Tensor) or (value.dtype, value.device) != (example.dtype, example.device):
        return False
    if value.dim() != len(example.shape) or (value.requires_grad and torch.is_grad_enabled()):
        return False
    pairs = [*zip(example.shape, value.shape, strict=True)]
    # (The stride of a dimension of one says nothing.)
    strides = zip(example.stride, value.stride(), value.shape, strict=True)
    pairs += [(known, stride) for known, stride, size in strides if size != 1]
    return all(_same(known, size, sizes) for known, size in pairs)


def _same(known: Size, size: int, sizes: dict[sympy.Symbol, sympy.Integer]) -> bool:
    if isinstance(known, int):
        return known == size
    if isinstance(known, sympy.Symbol):
        return bool(sizes.setdefault(known, sympy.Integer(size)) == size)
    return bool(known.xreplace(sizes) == size)
