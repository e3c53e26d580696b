"""The static KV cache that one call of generate leaves for the next, in the loops of this package.

Captures, tapes and noted steps belong to the memory of one cache. `generate` makes a cache for every call, so each call
would begin with new ones. Here it is lent one that stays, in the place of

- a static one that it made because the caller asked for that (``cache_implementation="static"``);
- where the loop says that static ones are faster, one that grows, if the caller named none. It has room for the prompt
  and the next tokens, and is replaced by one of twice as many slots when these are full.

A model keeps one cache, that of its latest call, until `free_cache` or `restore`. The text in it stays too: a prompt
that begins with it has its entries already (`kept_texts.py`). A text that gives way to another one is saved beside the
cache, and copied back in where a prompt begins with more of it than of the one in place. All of them are texts of one
state of the model; a call that finds another state forgets them.

Not handled (the cache stays as `generate` made it): caches that the caller brings or gets back, and layers of other
kinds than full attention and sliding windows. Of calls at the same time one is lent what is kept. Not handled (no text
stays): batches, and texts of which a sliding window has become full.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from river_compile.kernels.native.load import any_rows
from river_compile.runtime.kept_texts import MANY, Prompt, SavedText, SavedTexts
from river_compile.upstream.transformers import (
    allocate,
    bytes_of,
    cache_argument,
    cache_of,
    copy_entries,
    is_allocated,
    is_static,
    keep_first,
    put_entries,
    sizes_of,
    static_cache,
)

_AHEAD = 512  # new tokens that a cache which grows has room for at first
_STEP = 256  # slots are a multiple of this, so that prompts of similar lengths find room in the same cache
# Bytes of all saved texts: some twenty conversations of 1,000 tokens of a small model (SmolLM2: 23 kB a token), four of
# one of 8B parameters (131 kB), and less than a tenth of the memory of a machine that runs it.
_SAVED = 512 * 2**20


class _Kept(NamedTuple):
    """A cache between two calls: its kind, and the tokens of the text in it."""

    key: Hashable
    cache: StaticCache
    text: Tensor | None


class KeptTexts(NamedTuple):
    """The texts of a pool.

    Attributes:
        texts, tokens: how many there are, the one in the cache among them, and how many tokens they have.
        saved_bytes: of those beside the cache.
        reused: tokens of prompts that were in a text, and did not run again, so far.
    """

    texts: int = 0
    tokens: int = 0
    saved_bytes: int = 0
    reused: int = 0


class CachePool:
    """A model's pool of at most one cache between two calls, and of saved texts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: _Kept | None = None
        self._saved = SavedTexts(_SAVED)
        self._state: object | None = None  # of the model, which all texts are of
        self._reused = 0

    def take(
        self, key: Hashable, wanted: StaticCache, least: int, prompt: Prompt | None = None
    ) -> tuple[StaticCache, int]:
        """Returns a cache for a call, and how many tokens of its prompt have entries in it; nothing else is in it.

        Args:
            key: the kind of cache.
            wanted: a new cache of that kind.
            least: slots with which the kept one is taken nevertheless.
            prompt: of the call; None begins with nothing.

        Returns:
            The kept cache or the one that is wanted, which has no memory yet where it has no entries.
        """
        state = None if prompt is None else prompt.state()
        with self._lock:
            if state is not None and state != self._state:
                self._forget(state)
            kept, self._kept = self._kept, None
            shared, source = (0, None) if prompt is None or state is None else self._saved.longest(prompt)
        in_place = None if kept is None or kept.text is None else SavedText.of(kept.text, kept.cache)
        if in_place is not None:
            here = 0 if prompt is None or state is None else prompt.shares(in_place.ids)
            if here and here >= shared:
                shared, source = here, in_place
            if len(in_place.ids) - (shared if source is in_place else 0) >= MANY:
                self.save(in_place)
        needed = [min(size, least) for size in sizes_of(wanted)]
        fits = kept is not None and kept.key == key and not any(map(int.__lt__, sizes_of(kept.cache), needed))
        cache = kept.cache if kept is not None and fits else wanted
        if source is None:
            if fits:
                cache.reset()
        elif source is in_place and fits:
            keep_first(cache, shared)
        else:
            put_entries(cache, source.layers, shared)
        with self._lock:
            self._reused += shared
        return cache, shared

    def put(self, key: Hashable, cache: StaticCache, text: Tensor | None = None, state: object | None = None) -> None:
        """Keeps a cache in the place of the one before, with a text's first entries that a state of the model made."""
        with self._lock:
            others, self._kept = self._kept, _Kept(key, cache, text if state == self._state else None)
        if others is not None and others.text is not None:  # (of a call at the same time)
            self.save(SavedText.of(others.text, others.cache))

    def save(self, text: SavedText) -> None:
        """Saves a copy of a text whose entries were made in the state of the model that the latest call found."""
        with self._lock:
            state, lacks = self._state, self._saved.lacks(text)
        copied = text.copied() if lacks else None
        with self._lock:
            if copied is not None and state is self._state:
                self._saved.add(copied)

    def forget_texts(self) -> None:
        """Has the next call take a fresh prompt."""
        with self._lock:
            self._forget(None)

    def _forget(self, state: object | None) -> None:
        self._saved.clear()
        self._state = state
        if self._kept is not None:
            self._kept = self._kept._replace(text=None)

    def free(self) -> int:
        """Lets go of the cache and all texts; returns how many bytes that frees."""
        held = self.bytes + self.texts.saved_bytes
        with self._lock:
            self._kept = None
            self._forget(None)
        return held

    @property
    def bytes(self) -> int:
        """The bytes of the cache, 0 where it is borrowed."""
        kept = self._kept
        return 0 if kept is None else bytes_of(kept.cache)

    @property
    def texts(self) -> KeptTexts:
        """What is kept of them now."""
        with self._lock:
            lengths = self._saved.lengths
            if self._kept is not None and self._kept.text is not None:
                lengths.append(len(self._kept.text))
            return KeptTexts(len(lengths), sum(lengths), self._saved.bytes, self._reused)


class BorrowedCache:
    """The cache of one call.

    Args:
        model: generates.
        kwargs: arguments of its forward passes, the cache among them.
        grows: whether a longer one takes its place where it is full.
        prompt: of the call, where its text may be kept; None where it may not.
        filled: tokens of the prompt that have entries in the cache.

    Attributes:
        kwargs: the arguments with the cache that was lent.
        cache: to keep after the call, None where none was lent.
        filled: as above.
        text: tokens of the text to keep with the cache, None for none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kwargs: dict[str, Any],
        cache: StaticCache | None,
        grows: bool,
        prompt: Prompt | None = None,
        filled: int = 0,
    ) -> None:
        self._model, self._grows, self._prompt = model, grows, prompt
        self.cache, self.filled = cache, filled
        self.text: Tensor | None = None
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

    def keep_text(self, ids_BS: Tensor, filled: int) -> None:
        """Has the text kept that is in the cache at the end of a call, if the call's may be.

        Where a row of a pass has the same bits whatever their number, only the prompt's entries are: a later prompt
        that has the new tokens too makes other ones of them.

        Args:
            ids_BS: its tokens, and perhaps some without entries.
            filled: how many of them have entries that the backbone made.
        """
        if self._prompt is None or self.cache is None or filled > min(sizes_of(self.cache)):
            return  # (a window that was full has forgotten its first tokens)
        if self._model.device.type == "cpu" and any_rows(self._model.dtype):
            filled = min(filled, len(self._prompt.ids))
        if filled >= MANY:
            self.text = ids_BS[0, :filled].cpu()


@contextlib.contextmanager
def borrowed_cache(
    pool: CachePool,
    model: PreTrainedModel,
    ids_BS: Tensor,
    config: GenerationConfig,
    kwargs: dict[str, Any],
    shared: bool,
    static: bool,
    prompt: Prompt | None = None,
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
        prompt: the same ids, where the call may begin with a kept text and leave one.
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
    rows = len(ids_BS)
    least = tokens + _AHEAD // 2 if grows else max(sizes_of(wanted))
    cache, filled = lend(pool, model, rows, wanted, least, prompt)
    lent = BorrowedCache(model, kwargs, cache, grows, prompt, filled)
    try:
        yield lent
    finally:
        pool.put(_key(model, rows), lent.cache, lent.text, None if prompt is None else prompt.state())


def lend(
    pool: CachePool, model: PreTrainedModel, rows: int, wanted: StaticCache, least: int, prompt: Prompt | None
) -> tuple[StaticCache, int]:
    """Returns a cache, and how many tokens of a prompt have entries in it; nothing else is in it.

    `CachePool.put` gives it back.

    Args:
        pool: of the model.
        model: whose cache it is.
        rows: of the cache.
        wanted: a new cache.
        least: slots with which the kept one is taken nevertheless.
        prompt: None begins with nothing; of several rows, and where a window would become full, nothing was kept.
    """
    if rows > 1 or not is_static(wanted) or (prompt is not None and len(prompt.ids) > min(sizes_of(wanted))):
        prompt = None
    cache, filled = pool.take(_key(model, rows), wanted, least, prompt)
    if not is_allocated(cache):
        allocate(cache, model, rows)
    return cache, filled


def _rounded(slots: int, model: PreTrainedModel) -> int:
    """Returns a number of slots that many texts have in common; no more than a model has positions (MPT's bias)."""
    return min(-(-slots // _STEP) * _STEP, getattr(model.config, "max_seq_len", None) or sys.maxsize)


def _key(model: PreTrainedModel, rows: int) -> Hashable:
    """Returns what a cache's tensors depend on beside its length."""
    device = model.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return rows, model.dtype, device, autocast, torch.is_inference_mode_enabled()
