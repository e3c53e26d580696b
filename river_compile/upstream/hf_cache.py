"""KV caches of transformers, in the spelling of every release that is supported (`versions.py`).

Newer releases call a model's cache ``cache`` and can free the last slots of a static one; older ones call it
``past_key_values`` and cannot, and their sliding windows that remember what left them show it to attention too. Not
handled: caches of encoder-decoder models.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    QuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_NAMES = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> str:
    """Returns how a model's forward, its `generate` and their outputs call the cache."""
    return next(name for name in _NAMES if name in inspect.signature(model.forward).parameters)


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """Returns the cache among a forward's arguments, None where there is none."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def cannot_crop(cache: Cache) -> list[str]:
    """Returns the names of the classes of those layers whose last slots cannot be freed, sorted.

    A static sliding window is not among them: `crop_layer` frees its slots while it has dropped nothing, and from then
    on its entries must be copied before they go (`speculative/rewind.py`).
    """
    static = (StaticLayer, StaticSlidingWindowLayer)

    def can(layer: Any) -> bool:  # (older releases call quantized layers croppable)
        return type(layer) in static or (layer.is_croppable and not isinstance(layer, QuantizedLayer))

    return sorted({type(layer).__name__ for layer in cache.layers if not can(layer)})


def remember_past(cache: Cache) -> None:
    """Makes sliding windows that grow keep what leaves them until the next `crop`, which may bring it back."""
    cache.activate_past_recording()
    for layer in cache.layers if _shows_the_past(DynamicSlidingWindowLayer) else ():
        if type(layer) is DynamicSlidingWindowLayer:
            layer.__class__ = _RememberingWindow


class _RememberingWindow(DynamicSlidingWindowLayer):
    """Shows attention the window alone, however much it remembers."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        visible = self.sliding_window - 1 + key_states.shape[-2]
        return keys[:, :, -visible:], values[:, :, -visible:]


@functools.cache
def _shows_the_past(window: type[DynamicSlidingWindowLayer]) -> bool:
    """Whether a window of two tokens that remembers shows three to attention."""
    layer, one = window(sliding_window=2), torch.zeros(1, 1, 1, 1)
    layer.activate_past_recording()
    return [layer.update(one, one)[0].shape[2] for _ in range(3)][-1] > 2


def crop(cache: Cache, tokens: int) -> None:
    """Frees a cache's last slots; even for none, sliding windows that grow are trimmed to what they need."""
    for layer in cache.layers:
        crop_layer(layer, tokens)


def crop_layer(layer: Any, tokens: int) -> None:
    """Frees a layer's last slots, as `crop` does."""
    if hasattr(layer, "crop"):
        layer.crop(-tokens)
        return
    layer.cumulative_length.sub_(tokens)
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int -= tokens


def rows_can_part(layer: Any) -> bool:
    """Whether a layer holds nothing but keys and values ``[B, H, slots, D]``, in which rows may be moved."""
    kinds = (StaticLayer, StaticSlidingWindowLayer, DynamicLayer, DynamicSlidingWindowLayer, _RememberingWindow)
    return type(layer) in kinds


def with_rows(cache: Cache, rows: Sequence[int]) -> Cache:
    """Returns a cache of some of a cache's rows, whose layers are all such that `rows_can_part`.

    Those of static layers move to the front of the same memory, so that what knows its address finds them; the cache
    that was given is of no use afterwards.
    """
    chosen = copy.copy(cache)
    chosen.layers = [_layer_with_rows(layer, rows) for layer in cache.layers]
    return chosen


def _layer_with_rows(layer: Any, rows: Sequence[int]) -> Any:
    chosen = copy.copy(layer)
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        moved = tensor.index_select(0, torch.tensor(rows, device=tensor.device))
        if isinstance(layer, StaticLayer):
            moved = tensor[: len(rows)].copy_(moved)
        setattr(chosen, name, moved)
    if hasattr(layer, "batch_size"):
        chosen.batch_size = len(rows)
    return chosen


def slots_needed(layer: Any, tokens: int) -> int:
    """Returns how many of the last entries of this many tokens a layer that grows needs."""
    return min(tokens, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else tokens


def set_length(layer: Any, tokens: int) -> None:
    """Makes a layer whose entries were put in place by hand one that holds the last of so many tokens."""
    if isinstance(layer, StaticSlidingWindowLayer):
        layer.cumulative_length_int = tokens
    if isinstance(layer, StaticLayer):
        if tokens <= layer.max_cache_len:  # (a full window leaves it as it was)
            layer.cumulative_length.fill_(tokens)
    elif isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = tokens
