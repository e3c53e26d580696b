"""The layers of a model by kind: traced code cannot tell those of one kind apart, but for their number.

Not handled (a Refusal): models with no list of layers, or several of that length.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from river_compile.compile_cache.identity import OF_ALL_MODULES, plain_attributes
from river_compile.passes.program import Refusal


@dataclass(frozen=True)
class Layers:
    """A model's layers."""

    path: str  # of their module list
    kinds: tuple[int, ...]  # by layer: the first one of its kind


def layers_of(model: PreTrainedModel, cache: Cache | None = None) -> Layers | Refusal:
    """Return a model's layers by kind; with a cache, layers of one kind have cache layers of one kind."""
    config = model.config.get_text_config(decoder=True)
    count = getattr(config, "num_hidden_layers", 0)
    found = [path for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    outermost = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        return Refusal(f"{len(outermost)} of its module lists are as long as it has layers")
    kinds = _kinds(model.get_submodule(outermost[0]), cache, config)
    return Layers(outermost[0], tuple(map(kinds.index, kinds)))


def _kinds(layers: Any, cache: Cache | None, config: PretrainedConfig) -> list[str]:
    """Return a text for each layer, equal for layers of one kind."""
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


def _describe_cache(cache: Cache | None, index: int) -> Iterator[tuple[str, object]]:
    layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
    yield "", type(layer).__qualname__
    for name, value in () if layer is None else sorted(vars(layer).items()):
        yield name, _metadata(value) if isinstance(value, Tensor) else value


def _metadata(tensor: Tensor) -> tuple[object, ...]:
    return (*tensor.shape,), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def with_layers(model: Any, path: str, chosen: Sequence[int]) -> Any:
    """Return a shallow copy of a model that has some of its layers; the model, which others may run, stays."""
    config = model.config.get_text_config(decoder=True)
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
