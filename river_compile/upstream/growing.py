"""Tells Dynamo which sizes of a call will be others in the next one, before it traces.

Left alone, Dynamo takes the sizes that it sees first for constants, and traces the model a second time when the next
token finds one entry more. A mark on the dimension makes it trace once. Marks are weak: where the model's code needs a
constant, it gets one, as it would without.

A graph that was traced without marks does not serve marked tensors, so the same kind of call has to be marked always or
never. Not handled: masks of four dimensions, which `generate` makes for static caches, whose sizes are constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from transformers.cache_utils import DynamicLayer

from .hf_cache import cache_of

_TOKENS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "attention_mask": 1}


def mark_growing(arguments: Mapping[str, Any], prompts: bool) -> None:
    """Marks the entries of caches that grow, and the mask over them, in the arguments of a model's forward, by name.

    With `prompts`, ids and masks are marked without such a cache too.
    """
    tensors = [*_entries(arguments)]
    if prompts or tensors:
        tensors += _by_token(arguments)
    for tensor, dim in tensors:
        if tensor.shape[dim] > 1:  # (Dynamo compiles sizes of 0 and 1 by themselves)
            maybe_mark_dynamic(tensor, dim % tensor.dim())


def _by_token(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    for name, dim in _TOKENS.items():
        value = arguments.get(name)
        if isinstance(value, Tensor) and 1 <= value.dim() < 4:
            yield value, dim


def _entries(arguments: Mapping[str, Any]) -> Iterator[tuple[Tensor, int]]:
    for layer in getattr(cache_of(arguments), "layers", ()):
        if isinstance(layer, DynamicLayer) and layer.is_initialized and layer.keys.dim() == 4:
            yield from ((layer.keys, 2), (layer.values, 2))
