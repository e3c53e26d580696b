"""A pass that was traced once, as other processes can run it: its program, and where the inputs of its graph come from.

Dynamo gathers a graph's inputs by code that it generates. Here each of them has a :class:`Source`: a parameter by its
path, a field of a layer of the KV cache, an argument of the model's forward by its name, or a size of one of these.

Not handled (a :class:`NotStorable`): graphs with inputs from elsewhere.
"""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import sympy
import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import Cache

from river_compile.passes.nodes import value_of
from river_compile.passes.program import Refusal, RiverProgram
from river_compile.passes.segments import recognise
from river_compile.passes.sizes import with_size
from river_compile.store.graphs import Condition, NotStorable, conditions_on

log = logging.getLogger("river_compile.store")
_IN_CACHE = re.compile(r"layers\[(\d+)\]\.(\w+)$")


class Source(NamedTuple):
    """Where an input of a graph comes from.

    Attributes:
        kind: "model" (a parameter or buffer), "cache" (a field of a layer), "call" (an argument), or "size".
        name: its path in the model; the field; the argument as :func:`named` has it.
        layer: of the cache.
    """

    kind: Literal["model", "cache", "call", "size"]
    name: Any = ""
    layer: int = 0


def named(inputs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields a forward's arguments with their names, those in a dict (masks by kind of attention) one by one."""
    for name, value in inputs.items():
        if type(value) is dict:
            yield from (((name, key), inner) for key, inner in value.items())
        else:
            yield name, value


@dataclass(frozen=True)
class StoredPass:
    """One pass.

    Attributes:
        program: the rewritten program.
        inputs: how the user's code names the graph's inputs, in order.
        sources: where they come from, in the same order.
        logits: which of the graph's outputs the model returns as logits.
        matrices: names of all matmuls that the model can have twins of.
        conditions: what is assumed about dynamic sizes.
    """

    program: RiverProgram
    inputs: tuple[str, ...]
    sources: tuple[Source, ...]
    logits: int
    matrices: tuple[str, ...]
    conditions: tuple[Condition, ...]

    @classmethod
    def of(
        cls,
        program: RiverProgram,
        names: tuple[str, ...],
        matrices: tuple[str, ...],
        logits: int,
        model: nn.Module,
        args: Sequence[Any],
        inputs: Mapping[str, Any],
        cache: Cache,
    ) -> StoredPass:
        """Returns what is to be kept of a pass that ran.

        Args:
            program, names, matrices, logits: as the attributes.
            model: the model.
            args: the graph's inputs.
            inputs: those of the model, by name; the cache is among them.
            cache: the KV cache.

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
        nodes = program.inputs
        sources = tuple(_source(node, arg, name, known) for node, arg, name in zip(nodes, args, names, strict=True))
        return cls(program, names, sources, logits, matrices, conditions_on(map(value_of, nodes)))

    def of_one_token(self) -> StoredPass | None:
        """Returns the pass of one token in each row that follows from one of several, with a program that has yet to be
        rewritten; None, and a line in the log, where none follows.

        Only of a pass that Dynamo traced in this process, the graph of which is whole.
        """
        length = self.program.plan.query_length
        if isinstance(length, int) or not length.node.expr.is_Symbol:
            return None
        symbol = length.node.expr
        try:
            found = recognise(with_size(self.program.plan.graph, symbol, 1), twins=False)
        except Exception as error:  # (whatever operators raise)
            found = Refusal(f"{type(error).__name__}: {error}")
        if isinstance(found, Refusal):
            log.info("no pass of one token follows from one of several: %s", found)
            return None
        left = {node.name for node in found.inputs}
        inputs, sources = zip(
            *(
                (name, source)
                for node, name, source in zip(self.program.inputs, self.inputs, self.sources, strict=True)
                if node.name in left
            ),
            strict=True,
        )
        assumed = conditions_on(map(value_of, found.inputs))
        conditions = tuple(condition for condition in assumed if symbol not in condition.expr.free_symbols)
        return replace(self, program=found, inputs=inputs, sources=sources, conditions=conditions)

    @property
    def given(self) -> list[tuple[int, Any]]:
        """The numbers of the graph's inputs that are arguments of the model's forward, with their names."""
        return [(number, source.name) for number, source in enumerate(self.sources) if source.kind == "call"]

    def arguments(self, model: nn.Module, inputs: Mapping[str, Any], cache: Cache) -> list[Any] | None:
        """Returns the graph's inputs for a call of a model, None if its program is not for such inputs.

        Args:
            model: the model, of the same identity.
            inputs: of its forward, by name.
            cache: the KV cache among them.
        """
        call, sizes = dict(named(inputs)), dict[sympy.Symbol, sympy.Integer]()
        args: list[Any] = [None] * len(self.sources)
        for number in self._others:
            source, example = self.sources[number], self._examples[number]
            args[number] = arg = _read(source, cache, call)
            if source.kind != "size" and not _fits(example, arg, sizes):
                return None
        for number in self._others:
            if self.sources[number].kind == "size":
                size = self._examples[number]  # (a number where Dynamo found that it is always the same)
                if isinstance(size, torch.SymInt):
                    size = size.node.expr.xreplace(sizes)
                    if not size.is_Integer:
                        return None
                args[number] = int(size)
        if not all(condition.holds(sizes) for condition in self.conditions):
            return None
        for number, parameter in self._parameters:  # (which are what they were, as the model's identity is)
            args[number] = parameter(model)
        return args

    @functools.cached_property
    def _parameters(self) -> list[tuple[int, Callable[[nn.Module], Any]]]:
        found = ((number, source) for number, source in enumerate(self.sources) if source.kind == "model")
        return [(number, operator.attrgetter(source.name)) for number, source in found]

    @functools.cached_property
    def _others(self) -> list[int]:
        return [number for number, source in enumerate(self.sources) if source.kind != "model"]

    @functools.cached_property
    def _examples(self) -> list[Any]:
        return [value_of(node) for node in self.program.inputs]


def _source(node: fx.Node, arg: Any, name: str, known: Mapping[int, Source]) -> Source:
    if isinstance(arg, Tensor) and id(arg) in known:
        return known[id(arg)]
    if isinstance(arg, int) and isinstance(value_of(node), torch.SymInt):
        counter = _IN_CACHE.search(name)  # (a static sliding window counts its tokens in Python)
        return Source("size") if counter is None else Source("cache", counter[2], int(counter[1]))
    raise NotStorable(f"it is not known where {name} comes from")


def _read(source: Source, cache: Cache, call: Mapping[Any, Any]) -> Any:
    """Returns an input that is no parameter, None where there is none."""
    if source.kind == "cache":
        return getattr(cache.layers[source.layer], source.name, None) if source.layer < len(cache.layers) else None
    return call.get(source.name)


def _fits(example: Any, value: Any, sizes: dict[sympy.Symbol, sympy.Integer]) -> bool:
    """Tells whether a tensor or number is like the example, and notes what the dynamic sizes are."""
    if isinstance(example, torch.SymInt):
        return isinstance(value, int) and _same(example, value, sizes)
    if not isinstance(value, Tensor) or (value.dtype, value.device) != (example.dtype, example.device):
        return False
    if value.dim() != example.dim() or (value.requires_grad and torch.is_grad_enabled()):
        return False
    pairs = [*zip(example.shape, value.shape, strict=True)]
    # (The stride of a dimension of one says nothing.)
    strides = zip(example.stride(), value.stride(), value.shape, strict=True)
    pairs += [(known, stride) for known, stride, size in strides if size != 1]
    return all(_same(known, size, sizes) if isinstance(known, torch.SymInt) else known == size for known, size in pairs)


def _same(known: torch.SymInt, size: int, sizes: dict[sympy.Symbol, sympy.Integer]) -> bool:
    expr = known.node.expr
    if expr.is_Symbol:
        return bool(sizes.setdefault(expr, sympy.Integer(size)) == size)
    return bool(expr.xreplace(sizes) == size)
