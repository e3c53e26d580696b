"""Tells Dynamo which sizes of a call will be others in the next one, before it traces.

Left alone, Dynamo takes the sizes that it sees first for constants, and traces the model a second time when the next
token finds one entry more. A mark on the dimension makes it trace once. Marks are weak: where the model's code needs a
constant, it gets one, as it would without.

A graph that was traced without marks does not serve marked tensors, so the same kind of call has to be marked always or
never. Not handled: masks of four dimensions, which `generate` makes for static caches, whose sizes are constant.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from transformers.cache_utils import DynamicLayer

from .hf_cache import cache_of

_TOKENS = {"input_ids": 1, "inputs_embeds": 1, "position_ids": -1, "cache_position": 0, "attention_mask": 1}


def marks_growing(compiled: Callable[..., Any], prompts: bool) -> Callable[..., Any]:
    """Returns a compiled model's call with marks on the sizes that grow; `unmarked` gives `compiled` back.

    Args:
        compiled: what ``torch.compile`` returned.
        prompts: whether all calls are marked, for prompts of any length; False where one may have been traced already:
            then what goes on with a cache that grows is marked, which Dynamo would have traced again anyway.
    """
    if hasattr(compiled, "river_unmarked"):
        return compiled

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        mark_growing(kwargs, prompts)
        return compiled(*args, **kwargs)

    call.river_unmarked = compiled  # type: ignore[attr-defined]  # (a function's type declares no attributes)
    return call


def unmarked(call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `marks_growing` was given."""
    found: Callable[..., Any] = getattr(call, "river_unmarked", call)
    return found


def mark_growing(arguments: Mapping[str, Any], prompts: bool) -> None:
    """Marks the entries of caches that grow, and the mask over them, in the arguments of a model's forward, by name."""
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
