"""One call of a model's forward: what its arguments are like, and where each input of a graph of it comes from.

Not handled (a Refusal): inputs other than parameters and buffers, fields of the KV cache, arguments of the forward and
their sizes.
"""

from __future__ import annotations

import functools
import hashlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.passes.freeze import size_conditions
from river_compile.passes.nodes import value_of
from river_compile.passes.program import Example, Input, Program, Refusal, RiverProgram, Size, Source, TensorSpec


def named_arguments(inputs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield a forward's arguments by name, those in a dict (masks by kind of attention) by (name, key)."""
    for name, value in inputs.items():
        if type(value) is dict:
            yield from (((name, key), inner) for key, inner in value.items())
        else:
            yield name, value


@dataclass(frozen=True, eq=False)
class Forward:
    """The arguments of one call of a model, on a full static KV cache."""

    model: PreTrainedModel
    inputs: Mapping[str, Any]  # by name, with the cache among them
    cache: Cache

    @property
    def is_one_token(self) -> bool:
        return bool(self.inputs["input_ids"].shape[1] == 1)

    @functools.cached_property
    def kinds(self) -> tuple[tuple[str, str], ...]:
        """The name and the kind of each argument: a tensor's dtype and dimensions, other values."""
        # A program reads one tensor for two arguments that were one tensor when it was traced.
        first: dict[int, str] = {}

        def kind(name: str, value: object) -> object:
            if isinstance(value, Tensor):
                return value.dtype, value.dim(), first.setdefault(id(value), name)
            return type(value).__qualname__ if isinstance(value, Cache) else value

        arguments = sorted(((str(name), value) for name, value in self.arguments), key=operator.itemgetter(0))
        return tuple((name, str(kind(name, value))) for name, value in arguments)

    @property
    def arguments(self) -> Iterator[tuple[Any, Any]]:
        return named_arguments(self.inputs)

    @property
    def shapes(self) -> dict[Any, torch.Size]:
        """The shape of each tensor among the arguments, by name."""
        return {name: value.shape for name, value in self.arguments if isinstance(value, Tensor)}

    def signature(self, one_token: bool | None = None) -> str:
        """Return a hash of the kinds of arguments, not their sizes; `one_token` overrides that property of theirs."""
        one_token = self.is_one_token if one_token is None else one_token
        layers = [type(layer).__qualname__ for layer in self.cache.layers]
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        return hashlib.sha256(repr((one_token, self.kinds, layers, modes)).encode()).hexdigest()[:24]

    @functools.cached_property
    def sources(self) -> dict[int, Source]:
        """The sources of all tensors that the call may read, by ``id``."""
        model, known = self.model, dict[int, Source]()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            known[id(tensor)] = Source("model", name)
        for number, layer in enumerate(self.cache.layers):
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    known[id(value)] = Source("cache", name, number)
        given = ((name, value) for name, value in self.arguments if isinstance(value, Tensor))
        return known | {id(value): Source("call", name) for name, value in given}

    def with_sources(self, program: Program, traced: RiverProgram, args: Sequence[Any]) -> Program | Refusal:
        """Return a program of this call with the sources of its inputs, whose values are `args`."""
        inputs = [self._with_source(given, arg) for given, arg in zip(program.inputs, args, strict=True)]
        unknown = next((given.name for given in inputs if given.source is None), None)
        if unknown is not None:
            return Refusal("it is not a parameter, a field of the KV cache, an argument or a size", unknown)
        return replace(program, inputs=tuple(inputs), conditions=size_conditions(map(value_of, traced.inputs)))

    def _with_source(self, given: Input, arg: Any) -> Input:
        if isinstance(arg, Tensor):
            return replace(given, source=self.sources.get(id(arg)))
        is_size = isinstance(arg, int) and given.example is not None and not isinstance(given.example, TensorSpec)
        return replace(given, source=Source("size") if is_size else None)

    def read(self, inputs: Sequence[Input], conditions: Sequence[sympy.Basic]) -> list[Any] | None:
        """Return the values of a program's inputs in this call; None if the program does not accept them."""
        call, sizes = dict(self.arguments), _Sizes()
        args: list[Any] = [None] * len(inputs)
        numbers: list[int] = []
        for number, given in enumerate(inputs):
            source = given.source
            assert source is not None, "a program that is looked for has sources"
            if source.kind == "size":
                numbers.append(number)
            elif source.kind == "model":  # its shape and dtype are part of the model's identity
                args[number] = operator.attrgetter(source.name)(self.model)
            else:
                args[number] = arg = self._read_source(source, call)
                if not sizes.accept(given.example, arg):
                    return None
        for number in numbers:
            args[number] = sizes.evaluate(inputs[number].example)
            if args[number] is None:
                return None
        return args if all(condition.xreplace(sizes.known) == sympy.true for condition in conditions) else None

    def _read_source(self, source: Source, call: Mapping[Any, Any]) -> Any:
        """Return a field of the KV cache or an argument, None if it is missing."""
        if source.kind == "cache":
            layers = self.cache.layers
            return getattr(layers[source.layer], source.name, None) if source.layer < len(layers) else None
        return call.get(source.name)


class _Sizes:
    """The values of a program's dynamic sizes, as far as its inputs show them."""

    def __init__(self) -> None:
        self.known: dict[sympy.Symbol, sympy.Integer] = {}

    def accept(self, example: Example, value: Any) -> bool:
        """Whether a tensor or number is like the example; learns the values of dynamic sizes."""
        if not isinstance(example, TensorSpec):
            return isinstance(value, int) and example is not None and self._is(example, value)
        if not isinstance(value, Tensor) or (value.dtype, value.device) != (example.dtype, example.device):
            return False
        if value.dim() != len(example.shape) or (value.requires_grad and torch.is_grad_enabled()):
            return False
        pairs = [*zip(example.shape, value.shape, strict=True)]
        # The stride of a dimension of size 1 is arbitrary.
        strides = zip(example.stride, value.stride(), value.shape, strict=True)
        pairs += [(known, stride) for known, stride, size in strides if size != 1]
        return all(self._is(known, size) for known, size in pairs)

    def _is(self, known: Size, size: int) -> bool:
        if isinstance(known, int):
            return known == size
        if isinstance(known, sympy.Symbol):
            return bool(self.known.setdefault(known, sympy.Integer(size)) == size)
        return bool(known.xreplace(self.known) == size)

    def evaluate(self, example: Example) -> int | None:
        """Return the value of a size, None if the inputs do not determine it."""
        if isinstance(example, int):  # static, by Dynamo's analysis
            return example
        assert isinstance(example, sympy.Expr), "a size is a number"
        size = example.xreplace(self.known)
        return int(size) if size.is_Integer else None
