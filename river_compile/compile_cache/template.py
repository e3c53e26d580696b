"""Traces a few layers in place of all: the first and the last of each kind, from which the others are stamped.

Not handled (a Refusal): models with no list of layers, or several, and layers that are mostly of a kind of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.compile_cache.identity import OF_ALL_MODULES, plain_attributes
from river_compile.passes.nodes import value_of
from river_compile.passes.normalize import normalized
from river_compile.passes.program import Refusal, Source
from river_compile.passes.stamp import Template
from river_compile.upstream.dynamo import trace
from river_compile.upstream.transformers import mark_dynamic


def trace_template(
    model: PreTrainedModel, inputs: Mapping[str, Any], cache: Cache, sources: Mapping[int, Source]
) -> Template | Refusal:
    """Trace some layers on a pass's inputs, without running them.

    `sources` are those of the model's tensors and the pass's arguments, by ``id``.
    """
    config = model.config.get_text_config(decoder=True)
    paths = _layer_lists(model, getattr(config, "num_hidden_layers", 0))
    if len(paths) != 1:
        return Refusal(f"{len(paths)} of its module lists are as long as it has layers")
    layers = model.get_submodule(paths[0])
    assert isinstance(layers, nn.ModuleList)
    kinds = _kinds(layers, cache, config)
    ends = [kinds.index(kind) for kind in kinds], [len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds]
    traced = sorted({*ends[0], *ends[1]})
    if 2 * len(traced) > len(layers) or len(traced) < 2:
        return Refusal(f"{len(traced)} of its {len(layers)} layers would be traced", paths[0])
    mark_dynamic(inputs)
    found = trace(_with_layers(model, paths[0], traced, config), inputs)
    if found is None:
        return Refusal("a call of the model does more than run one graph")
    normal, args = normalized(found[0]), found[1]
    nodes = normal.graph.find_nodes(op="placeholder")
    known = {node: sources[id(arg)] for node, arg in zip(nodes, args, strict=True) if id(arg) in sources}
    known |= {node: Source("size") for node in nodes if isinstance(value_of(node), (int, torch.SymInt))}
    if len(known) < len(nodes):
        name = next(node.name for node in nodes if node not in known)
        return Refusal("it is not a parameter, a field of the KV cache, an argument or a size", name)
    return Template(normal, known, paths[0], tuple(traced), tuple(traced.index(first) for first in ends[0]))


def _layer_lists(model: nn.Module, count: int) -> list[str]:
    """Return the paths of the outermost module lists of this length."""
    found = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return [path for path in found if not any(path.startswith(f"{other}.") for other in found)]


def _kinds(layers: nn.ModuleList, cache: Cache, config: PretrainedConfig) -> list[str]:
    """Return a text for each layer, equal for layers that traced code cannot tell apart, except by their number."""
    described = [[*_describe(layer)] for layer in layers]
    # An attribute that is the layer's number in each layer is that number.
    numbers = {
        entries[0][:2]
        for entries in zip(*described, strict=False)
        if all(entry[:2] == entries[0][:2] and entry[2] == index for index, entry in enumerate(entries))
    }
    lists = _lists_by_layer(config, len(layers)).values()
    return [
        repr(
            (
                [entry for entry in entries if entry[:2] not in numbers],
                [*_describe_cache(cache, index)],
                [value[index] for value in lists],
            )
        )
        for index, entries in enumerate(described)
    ]


def _lists_by_layer(config: PretrainedConfig, count: int) -> dict[str, Sequence[Any]]:
    """Return the fields of a configuration that have a value for each layer, but for lists of the layers' numbers."""
    lists = {name: value for name, value in vars(config).items() if isinstance(value, (list, tuple))}
    return {name: value for name, value in lists.items() if len(value) == count and [*value] != [*range(count)]}


def _describe(layer: nn.Module) -> Iterator[tuple[str, str, object]]:
    """Yield module, attribute and value of all that traced code may read of a layer."""
    for path, module in layer.named_modules():
        held = vars(module)
        yield path, "", type(module).__qualname__
        plain = dict(plain_attributes(held))
        for name in sorted(held.keys() - OF_ALL_MODULES):
            yield path, name, plain[name] if name in plain else _identity(held[name])
        for tensors in (held["_parameters"], held["_buffers"]):
            for name, tensor in tensors.items():
                yield path, name, tensor if tensor is None else _metadata(tensor)


def _identity(value: object) -> object:
    """Return what tells an object from others: its identity; of a partial function, its parts."""
    if isinstance(value, functools.partial):
        return id(value.func), value.args, value.keywords
    return id(value)


def _describe_cache(cache: Cache, index: int) -> Iterator[tuple[str, object]]:
    layer = cache.layers[index] if index < len(cache.layers) else None
    yield "", type(layer).__qualname__
    for name, value in () if layer is None else sorted(vars(layer).items()):
        yield name, _metadata(value) if isinstance(value, Tensor) else value


def _metadata(tensor: Tensor) -> tuple[object, ...]:
    return (*tensor.shape,), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _with_layers(model: Any, path: str, chosen: Sequence[int], config: PretrainedConfig) -> Any:
    """Return a shallow copy of a model that has some of its layers; the model, which others may run, stays."""
    fewer = copy.copy(config)
    for name, value in _lists_by_layer(config, config.num_hidden_layers).items():
        setattr(fewer, name, [value[index] for index in chosen])
    *owners, last = path.split(".")
    top = module = _shallow(model, config, fewer)
    for name in owners:
        module._modules[name] = _shallow(module._modules[name], config, fewer)
        module = module._modules[name]
    layers = module._modules[last]
    module._modules[last] = copy.copy(layers)
    module._modules[last]._modules = {str(i): layers[index] for i, index in enumerate(chosen)}
    return top


def _shallow(module: Any, config: PretrainedConfig, fewer: PretrainedConfig) -> Any:
    made = copy.copy(module)
    made._modules = dict(module._modules)
    for name, value in vars(module).items():
        if value is config:
            vars(made)[name] = fewer
    return made
