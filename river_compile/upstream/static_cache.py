"""Static KV caches of transformers: made for a model, and replaced by longer ones with the same entries.

Not handled (None): models whose static cache has layers other than full attention and sliding windows.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from .hf_cache import set_length

_KINDS = (StaticLayer, StaticSlidingWindowLayer)


def static_cache(model: PreTrainedModel, slots: int) -> StaticCache | None:
    """Returns a cache with room for so many tokens, whose layers have no memory yet."""
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=slots)
    return cache if is_static(cache) else None


def is_static(cache: Cache) -> bool:
    """Whether all layers of a cache are such as this module knows."""
    return all(type(layer) in _KINDS for layer in cache.layers)


def sizes_of(cache: Cache) -> list[int]:
    """Returns the slots of each layer: a sliding window has no more than it shows."""
    return [layer.max_cache_len for layer in cache.layers]


def bytes_of(cache: Cache) -> int:
    """Returns the memory of its keys and values."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)


def allocate(cache: StaticCache, model: PreTrainedModel, rows: int) -> None:
    """Gives a cache its memory before the first pass, where the shapes of a model's heads are known beyond doubt.

    That is, where transformers reads from the configuration what the layers that make the keys are. Elsewhere the first
    prompt allocates it, in a graph that no later prompt can use.
    """
    shape_of = getattr(model, "_get_static_cache_init_shape", lambda: None)
    shape = shape_of()
    if shape is None or torch.is_autocast_enabled(model.device.type):  # (autocast says what dtype keys have)
        return
    heads, features = ([n] * len(cache.layers) if isinstance(n, int) else n for n in shape)
    made = {getattr(m, "out_features", 0) for name, m in model.named_modules() if name.endswith("k_proj")}
    if made == {h * f for h, f in zip(heads, features, strict=True)}:
        cache.early_initialization(rows, heads, features, model.dtype, model.device)


def copy_entries(cache: Cache, longer: Cache, tokens: int) -> None:
    """Puts the entries of so many tokens, none of which fell behind for lack of slots, into a cache without memory."""
    for old, new in zip(cache.layers, longer.layers, strict=True):
        new.lazy_initialization(old.keys[:, :, :0], old.values[:, :, :0])
        for name in ("keys", "values"):
            entries = getattr(old, name)
            getattr(new, name)[:, :, : entries.shape[2]].copy_(entries)
        set_length(new, tokens)
