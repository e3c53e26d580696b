"""The static KV cache that one call of generate leaves for the next, in the loops of this package.

Captures, tapes and noted steps belong to the memory of one cache. `generate` makes a cache for every call, so each call
would begin with new ones. Here it is lent one that stays, emptied, in the place of

- a static one that it made because the caller asked for that (``cache_implementation="static"``);
- where the loop says that static ones are faster, one that grows, if the caller named none. It has room for the prompt
  and the next tokens, and is replaced by one of twice as many slots when these are full.

A model keeps one cache, that of its latest call, until `free_cache` or `restore`. Not handled (the cache stays as
`generate` made it): caches that the caller brings or gets back, and layers of other kinds than full attention and
sliding windows. Of calls at the same time one is lent what is kept.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from river_compile.upstream.transformers import (
    allocate,
    bytes_of,
    cache_argument,
    cache_of,
    copy_entries,
    sizes_of,
    static_cache,
)

_AHEAD = 512  # new tokens that a cache which grows has room for at first
_STEP = 256  # slots are a multiple of this, so that prompts of similar lengths find room in the same cache


class CachePool:
    """A model's pool of at most one cache between two calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[Hashable, StaticCache] | None = None

    def take(self, key: Hashable, sizes: list[int]) -> StaticCache | None:
        """Returns the cache, emptied, where it is of this kind and has as many slots in each layer; None otherwise."""
        with self._lock:
            kept, self._kept = self._kept, None
        if kept is None or kept[0] != key or any(map(int.__lt__, sizes_of(kept[1]), sizes)):
            return None
        kept[1].reset()
        return kept[1]

    def put(self, key: Hashable, cache: StaticCache) -> None:
        """Keeps a cache in the place of the one before."""
        with self._lock:
            self._kept = (key, cache)

    def free(self) -> int:
        """Lets go of the cache; returns how many bytes that frees."""
        held = self.bytes
        with self._lock:
            self._kept = None
        return held

    @property
    def bytes(self) -> int:
        """The bytes of the pool, without a borrowed cache."""
        kept = self._kept
        return 0 if kept is None else bytes_of(kept[1])


class BorrowedCache:
    """The cache of one call.

    Args:
        model: generates.
        kwargs: arguments of its forward passes, the cache among them.
        grows: whether a longer one takes its place where it is full.

    Attributes:
        kwargs: the arguments with the cache that was lent.
        cache: to keep after the call, None where none was lent.
    """

    def __init__(self, model: PreTrainedModel, kwargs: dict[str, Any], cache: StaticCache | None, grows: bool) -> None:
        self._model, self._grows = model, grows
        self.cache = cache
        self.kwargs = kwargs if cache is None else {**kwargs, cache_argument(model): cache}
        self._slots = 0 if cache is None else max(sizes_of(cache))

    def longer(self, cache: Cache, filled: int, tokens: int) -> StaticCache | None:
        """Returns a longer cache with the entries of the borrowed one, None if that has capacity or does not grow.

        Args:
            cache: in use: the one that was lent, perhaps with fewer rows by now.
            filled: its tokens.
            tokens: that are to follow.
        """
        if not self._grows or filled + tokens <= self._slots:
            return None
        self._slots = _rounded(max(2 * self._slots, filled + tokens), self._model)
        longer = static_cache(self._model, self._slots)
        assert longer is not None, "the one in use has layers of the same kinds"
        if sizes_of(longer) == sizes_of(cache):  # (sliding windows alone, which show no more)
            return None
        copy_entries(cache, longer, filled)
        if cache is self.cache:
            self.cache = longer
        return longer


@contextlib.contextmanager
def borrowed_cache(
    pool: CachePool,
    model: PreTrainedModel,
    ids_BS: Tensor,
    config: GenerationConfig,
    kwargs: dict[str, Any],
    shared: bool,
    static: bool,
) -> Iterator[BorrowedCache]:
    """Lends a call the pooled cache, or a new one that joins the pool afterwards.

    Args:
        pool: of the model.
        model: generates.
        ids_BS: of the prompt.
        config: of this call.
        kwargs: what `generate` prepared for its forward passes; the cache among them.
        shared: whether the caller brings or gets back a cache.
        static: whether a static cache may stand for one that grows.
    """
    made = None if shared else cache_of(kwargs)
    grows = static and type(made) is DynamicCache and config.cache_implementation is None
    asked = type(made) is StaticCache and config.cache_implementation == "static"
    wanted: Any = made if asked else None
    if grows:
        embeds = kwargs.get("inputs_embeds")  # (in place of ids, or of some before them)
        tokens = max(ids.shape[1] for ids in (ids_BS, embeds) if ids is not None)
        wanted = static_cache(model, _rounded(tokens + _AHEAD, model))
    if wanted is None or wanted.get_seq_length():
        yield BorrowedCache(model, kwargs, None, False)
        return
    rows = ids_BS.shape[0]
    key = _key(model, rows)
    cache = pool.take(key, sizes_of(wanted))
    if cache is None:
        cache = wanted
        allocate(cache, model, rows)
    lent = BorrowedCache(model, kwargs, cache, grows)
    try:
        yield lent
    finally:
        pool.put(key, lent.cache)


def _rounded(slots: int, model: PreTrainedModel) -> int:
    """Returns a number of slots that many texts have in common; no more than a model has positions (MPT's bias)."""
    return min(-(-slots // _STEP) * _STEP, getattr(model.config, "max_seq_len", None) or sys.maxsize)


def _key(model: PreTrainedModel, rows: int) -> Hashable:
    """Returns what a cache's tensors depend on beside its length."""
    device = model.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return rows, model.dtype, device, autocast, torch.is_inference_mode_enabled()
