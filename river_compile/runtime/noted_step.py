"""A decode step that is noted as it comes through Dynamo, so that it can run again without.

Not handled: caches that grow, whose steps write more than the graph does, and what `cache_looks.py` says of sliding
windows. Those steps are not noted.
"""

from __future__ import annotations

import dataclasses
import operator
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._dynamo.guards import dict_version
from transformers.utils import ModelOutput

from river_compile.upstream.dynamo_cache import CacheEntry
from river_compile.upstream.dynamo_calls import Ambient, code_that_runs, is_plain
from river_compile.upstream.hf_cache import cache_of
from river_compile.upstream.tensors import local_of

from .cache_looks import CacheLooks, count_of
from .executor import RiverExecutor

_FLAGS = (type(None), bool, int, float, str)
_KINDS = operator.attrgetter("dtype"), operator.attrgetter("is_cpu")


class Given:
    """What a call is given, by name.

    Attributes:
        values: the arguments, those in dicts among them (masks, by kind of attention).
        cache: the KV cache among them, None without.
        looks: the names, and what compiled code depends on of each value; None where something is neither tensor, flag
            nor cache.
        width: tokens of each row.
    """

    __slots__ = ("cache", "looks", "values", "width")

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.values: dict[Any, Any] = {}
        for name, value in arguments.items():
            if type(value) is dict:
                self.values.update(((name, key), inner) for key, inner in value.items())
            else:
                self.values[name] = value
        self.cache: Any = cache_of(arguments)
        looks = tuple((name, self._look(value)) for name, value in self.values.items())
        known = self.cache is not None and all(look is not None for _, look in looks)
        self.looks = looks if known else None
        ids = (self.values.get(name) for name in ("input_ids", "inputs_embeds"))
        self.width: int = next((value.shape[1] for value in ids if isinstance(value, Tensor)), 0)

    def _look(self, value: Any) -> tuple | None:
        if isinstance(value, Tensor):
            place = (value.dtype, value.device, value.requires_grad, value.is_inference())
            return type(value), value.shape, value.stride(), *place
        if type(value) in _FLAGS:
            return type(value), value
        return (type(value),) if value is self.cache else None


class Ran(NamedTuple):
    """A step that came through Dynamo.

    Attributes:
        executor: of its graph, held weakly.
        numbers: the integers among the graph's inputs.
        counted: by sliding windows before it, in tokens.
    """

    executor: weakref.ref[RiverExecutor]
    numbers: dict[int, int]
    counted: int | None


class Surroundings:
    """What a step meets beside what it is given.

    Attributes:
        executor: what ran the graph the last time, held weakly.
        dicts: where the model's modules and its configuration keep their attributes, parameters and submodules.
        cache_looks: how the cache looks.
    """

    def __init__(self, model: nn.Module, given: Given, executor: RiverExecutor, entry: CacheEntry) -> None:
        self.executor, self._entry = weakref.ref(executor), entry
        self.dicts = list(_dicts_of(model))
        self._cache = weakref.ref(given.cache)
        self._ambient = Ambient()
        self._versions = list(map(dict_version, self.dicts))
        self.cache_looks = CacheLooks(given.cache, given.width)
        self._written = None if entry.effects is None else entry.effects.values()

    @classmethod
    def of(cls, model: nn.Module, given: Given, executor: RiverExecutor) -> Surroundings | None:
        """Returns what surrounds a call, None where a call of the model does more than to run the executor's graph."""
        entry = executor.entry
        if entry is None or entry.effects is None or not hasattr(given.cache, "layers") or not is_plain():
            return None
        if _has_hooks(model) or entry.effects.code not in code_that_runs(model):
            return None
        return cls(model, given, executor, entry)

    def unchanged(self, model: nn.Module, cache: Any) -> bool:
        """Returns whether all of it is as it was."""
        return (
            self._cache() is cache
            and self._entry.holds(model)
            and not _has_hooks(model)
            and self._ambient.unchanged()
            and self.cache_looks.unchanged(cache)
            and list(map(dict_version, self.dicts)) == self._versions
        )

    @property
    def written(self) -> bool:
        """Whether the traced function's own writes changed anything outside of model and cache."""
        return self._entry.effects is None or self._entry.effects.values() != self._written


class _Places(NamedTuple):
    """Where a graph's inputs come from.

    Attributes:
        args: the model's own tensors, and dynamic sizes, which are those of tensors that look as they did; None for the
            others, so that no cache is kept alive.
        held: the inputs that a layer of the cache holds: number, layer, attribute, and its shape.
        given: the inputs that are given: number, name.
        tensors: the model's own tensors.
        kinds: their dtypes and whether they are on a CPU, which ``x.data = y`` exchanges without a trace.
        counts: the inputs that are what sliding windows have counted.
    """

    args: list[Any]
    held: list[tuple[int, int, str, torch.Size]]
    given: list[tuple[int, Any]]
    tensors: list[Tensor]
    kinds: list
    counts: list[int]

    @classmethod
    def of(cls, dicts: Sequence[dict], given: Given, args: Sequence[Any], counts: list[int]) -> _Places | None:
        """Returns where these inputs came from, None where one came from elsewhere or from two arguments."""
        names = {id(value): name for name, value in given.values.items() if isinstance(value, Tensor)}
        if len(names) < sum(isinstance(value, Tensor) for value in given.values.values()):
            return None
        layers = enumerate(map(vars, given.cache.layers))
        places = {id(value): (i, name) for i, layer in layers for name, value in layer.items()}
        values = (value for attributes in dicts for value in attributes.values() if isinstance(value, Tensor))
        owned = {id(part) for value in values for part in (value, local_of(value))}
        kept: list[Any] = [None] * len(args)
        from_layers, from_call = [], []
        for number, arg in enumerate(args):
            if isinstance(arg, Tensor) and id(arg) in names:
                from_call.append((number, names[id(arg)]))
            elif isinstance(arg, Tensor) and id(arg) in places:
                from_layers.append((number, *places[id(arg)], arg.shape))
            elif arg is None or type(arg) is int or id(arg) in owned:
                kept[number] = arg
            else:
                return None
        tensors = [arg for arg in kept if isinstance(arg, Tensor)]
        return cls(kept, from_layers, from_call, tensors, _kinds_of(tensors), counts)

    def inputs(self, given: Given, count: int | None) -> list[Any] | None:
        """Returns a graph's inputs, None where a dtype, device or shape is another one."""
        if _kinds_of(self.tensors) != self.kinds:
            return None
        args, layers = self.args.copy(), [vars(layer) for layer in given.cache.layers]
        for number, layer, name, shape in self.held:
            args[number] = held = layers[layer][name]
            if held.shape != shape:
                return None
        for number in self.counts:
            args[number] = count
        for number, name in self.given:
            args[number] = given.values[name]
        return args


class NotedStep:
    """A step that can run again with other ids, positions and masks; see :meth:`of`."""

    def __init__(self, around: Surroundings, given: Given, places: _Places, result: type, fields: dict) -> None:
        self.looks = given.looks
        self._around, self._places, self._result, self._fields = around, places, result, fields

    @classmethod
    def of(
        cls, around: Surroundings, model: nn.Module, given: Given, ran: tuple[Ran, Ran], call: tuple, result: Any
    ) -> NotedStep | None:
        """Notes a step.

        Args:
            around: its surroundings before it ran.
            model: the model.
            given: what it was given.
            ran: the step that looked like it before, and itself.
            call: inputs and outputs of its graph.
            result: what the model returned.

        Returns:
            The step; None where it changed its surroundings, or its graph's inputs or its result are not all found.
        """
        looks, (args, outputs) = around.cache_looks, call
        if not isinstance(result, ModelOutput) or around.written or not around.unchanged(model, given.cache):
            return None
        counts = _counts_among(*ran)
        if counts is None or not looks.lasting or not looks.has_counted(given.cache):
            return None
        places = _Places.of(around.dicts, given, args, counts)
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        fields = {name: value for name, value in fields.items() if value is not None}
        made = {id(value): i for i, value in enumerate(outputs)}
        if places is None or not all(value is given.cache or id(value) in made for value in fields.values()):
            return None
        numbers = {name: None if value is given.cache else made[id(value)] for name, value in fields.items()}
        return cls(around, given, places, type(result), numbers)

    def run(self, model: nn.Module, given: Given) -> Any:
        """Runs it once more and returns what the model would; None where that must go through Dynamo."""
        executor, looks = self._around.executor(), self._around.cache_looks
        if executor is None or not self._around.unchanged(model, given.cache) or not looks.again(given.cache):
            return None
        inputs = self._places.inputs(given, count_of(given.cache))
        if inputs is None:
            return None
        outputs = executor(*inputs)
        looks.let_count(given.cache)
        fields = {name: given.cache if i is None else outputs[i] for name, i in self._fields.items()}
        return self._result(**fields)


def _dicts_of(model: nn.Module) -> Iterator[dict]:
    """Yields the attributes of a model's modules and of its configurations, and the dicts among them.

    (Hooks are in ordered dicts, and are looked at otherwise.)
    """
    configs = {id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None}
    for owner in (*model.modules(), *configs.values()):
        attributes = getattr(owner, "__dict__", {})
        yield attributes
        yield from (value for value in attributes.values() if type(value) is dict and value)


def _counts_among(before: Ran, now: Ran) -> list[int] | None:
    """Returns which numbers of a graph are what sliding windows have counted, None where that cannot be told."""
    if now.numbers.keys() != before.numbers.keys():
        return None
    counts = [number for number, value in now.numbers.items() if value == now.counted]
    known = now.counted != before.counted and all(before.numbers[number] == before.counted for number in counts)
    same = all(value == before.numbers[number] for number, value in now.numbers.items() if number not in counts)
    return counts if same and (known or not counts) else None


def _kinds_of(tensors: list[Tensor]) -> list:
    return [kind for kind_of in _KINDS for kind in map(kind_of, tensors)]


def _has_hooks(model: nn.Module) -> bool:
    return bool(model._forward_hooks or model._forward_pre_hooks)
