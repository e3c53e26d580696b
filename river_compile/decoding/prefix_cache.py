"""The prefix cache: the KV cache between two calls of a model, and saved texts that a later prompt may begin with.

Texts are in memory; below it is `prefix_files.py`, if the model keeps prompts on disk.

Not handled: sharing entries between saved texts.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from river_compile.decoding.kv_cache import Entries, KVCache, slots_for
from river_compile.decoding.prefix_files import PrefixFiles
from river_compile.kernels.native.load import any_rows
from river_compile.model_state import ModelState

# Passes of few positions sum attention in another order than a prompt (`kFewPositions` of
# kernels/native/sources/operators/tensors.h), so at least this much of a prompt runs. Fewer entries are not worth
# keeping.
LEAST_PREFIX = 17
_AHEAD = 512  # new tokens that a new cache has slots for
# Bytes of all saved texts. They hold about twenty conversations of 1,000 tokens with SmolLM2 (23 kB a token), or four
# with a model of 8B parameters (131 kB). That is less than a tenth of the memory of a machine that runs it.
_SAVED = 512 * 2**20


class _Text(NamedTuple):
    """Token ids on the host, and their entries by layer, which may be views of a cache."""

    ids: Tensor
    entries: Entries

    def copied(self) -> _Text:
        """Return a copy in host memory; the device's is the model's."""
        return _Text(self.ids, [(_on_host(keys), _on_host(values)) for keys, values in self.entries])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.entries for t in pair)

    def begins_with(self, ids: Tensor) -> bool:
        return len(self.ids) >= len(ids) and torch.equal(self.ids[: len(ids)], ids)


class KeptTexts(NamedTuple):
    """Totals of a prefix cache."""

    texts: int = 0  # saved ones and the one in the cache
    tokens: int = 0  # of these texts
    saved_bytes: int = 0  # outside of the cache
    reused: int = 0  # prompt tokens that did not run again, so far
    from_disk: int = 0  # of these, whose entries were read from files


class _Pooled(NamedTuple):
    """The cache between two calls, its key, and the ids of its text."""

    key: tuple[Hashable, ...]
    cache: KVCache
    ids: Tensor | None


class PrefixPool:
    """A model's prefix cache: the KV cache of the latest call, and saved texts. Thread-safe."""

    # At most one KV cache stays, since captures belong to its memory. Another prompt's text is saved on the host and
    # copied back if a prompt shares more with it than with the text in the cache. All texts belong to one state of
    # the model.
    def __init__(self) -> None:
        self.files: PrefixFiles | None = None  # None: texts stay in memory
        self._lock = threading.Lock()
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._pooled: _Pooled | None = None
        self._saved: list[_Text] = []  # least recently used first
        self._state: ModelState | None = None  # of the model, for all texts
        self._reused = self._from_disk = 0

    def acquire(
        self, model: PreTrainedModel, rows: int, tokens: int, ids: Tensor | None = None, state: ModelState | None = None
    ) -> tuple[KVCache, int]:
        """Return a cache for a call, and the number of its prompt's tokens that have entries in it."""
        # ids: of a prompt that may reuse texts of this `state` of the model; None: no reuse. If the state is None or
        # new, no program stays bound to the cache.
        key = _key(model, rows)
        with self._lock:
            changed = state is None or state != self._state
            if state is not None and changed:
                self._forget(state)
            pooled, self._pooled = self._pooled, None
            if pooled is not None and changed:
                pooled.cache.states.clear()
            shared, source = (0, None) if ids is None or state is None else self._longest(ids)
            same = None if state is None else self._state  # one object until the model changes
        text = None if pooled is None or pooled.ids is None else _text_in(pooled)
        if text is not None:
            here = 0 if ids is None or state is None else _shared(ids, text.ids)
            if here and here >= shared:
                shared, source = here, text
            if len(text.ids) - (shared if source is text else 0) >= LEAST_PREFIX:
                self._save(text)
        slots, is_reusable = slots_for(model, tokens + _AHEAD), False
        if pooled is None or pooled.key[1:] != key[1:]:
            cache = KVCache.of(model, slots, rows)
        else:
            is_reusable = pooled.key == key and pooled.cache.slots >= min(tokens + _AHEAD // 2, slots)
            cache = pooled.cache if is_reusable else pooled.cache.like(slots, rows)
        if not cache.memory_rows:
            shared, source = 0, None
            self.files = None  # a first call of a process could take nothing from them
        parts = [] if source is None or (source is text and is_reusable) else [source.entries]
        mapped = []
        if self.files is not None and ids is not None and same is not None:
            mapped = self.files.find(model, same, ids[:-LEAST_PREFIX], shared, cache.prefix(0))
        if mapped:
            parts, shared = mapped, sum(part[0][0].shape[1] for part in mapped)
        if shared or is_reusable:
            cache.begin_with(shared, parts)
        with self._lock:
            self._reused += shared
            self._from_disk += shared if mapped else 0
        return cache, shared

    def release(
        self, model: PreTrainedModel, cache: KVCache, ids_BS: Tensor | None, prompt: int, state: ModelState | None
    ) -> None:
        """Return a cache to the pool, with the text whose entries are in it (``ids_BS``, None: none)."""
        if not (cache.is_full and cache.memory_rows):
            return
        if state is None:  # a later call cannot tell whether the model is the same
            cache.states.clear()
        ids = None if ids_BS is None else ids_BS[0]
        # If a row has the same bits at any number of rows, a later prompt that contains the new tokens would compute
        # other entries for them than decoding did: keep only the prompt's.
        if ids is not None and model.device.type == "cpu" and any_rows(model.dtype):
            ids = ids[:prompt]
        keeps = ids is not None and len(ids) >= LEAST_PREFIX
        with self._lock:
            self._model = self._model or self._freed_with(model)
            same = self._state
        text = ids.cpu() if ids is not None and keeps and state is not None and state == same else None
        if self.files is not None and text is not None and same is not None:
            self.files.save(model, same, text[:prompt], cache.prefix(prompt))
        with self._lock:
            text = text if same is self._state else None
            others, self._pooled = self._pooled, _Pooled(_key(model, cache.memory_rows), cache, text)
        if others is not None and others.ids is not None:  # from a concurrent call
            self._save(_text_in(others))

    def forget_texts(self) -> None:
        """Drop all texts; programs stay bound to the cache."""
        with self._lock:
            self._forget(self._state)

    def forget_state(self) -> None:
        """Drop all texts, and have the next call drop the programs: the model may have changed."""
        with self._lock:
            self._forget(None)

    def free(self) -> int:
        """Drop the cache and all texts; return the bytes that this frees."""
        held = self.bytes + self.texts.saved_bytes
        self._drop()
        return held

    def _drop(self) -> None:
        with self._lock:
            self._pooled = None
            self._forget(None)

    def _freed_with(self, model: PreTrainedModel) -> weakref.ref[PreTrainedModel]:
        """Return a reference that empties the pool with the model, whose weights the states hold."""
        mine = weakref.ref(self)

        def free(_: object) -> None:
            pool = mine()
            if pool is not None:  # (at the interpreter's exit, when this module's names may be gone)
                pool._drop()

        return weakref.ref(model, free)

    @property
    def bytes(self) -> int:
        """Bytes of the cache, 0 while a call has it."""
        pooled = self._pooled
        return 0 if pooled is None else pooled.cache.bytes

    @property
    def texts(self) -> KeptTexts:
        """The totals now."""
        with self._lock:
            lengths = [len(text.ids) for text in self._saved]
            if self._pooled is not None and self._pooled.ids is not None:
                lengths.append(len(self._pooled.ids))
            return KeptTexts(len(lengths), sum(lengths), self._saved_bytes, self._reused, self._from_disk)

    @property
    def _saved_bytes(self) -> int:
        return sum(text.bytes for text in self._saved)

    def _forget(self, state: ModelState | None) -> None:
        self._saved, self._state = [], state
        if self._pooled is not None:
            self._pooled = self._pooled._replace(ids=None)

    def _save(self, text: _Text) -> None:
        """Save a copy of a text in the current model state, unless a saved text begins with it."""
        with self._lock:
            state, covered = self._state, any(saved.begins_with(text.ids) for saved in self._saved)
        if covered or text.bytes > _SAVED:
            return
        copied = text.copied()
        with self._lock:
            if state is not self._state:
                return
            self._saved = [saved for saved in self._saved if not copied.begins_with(saved.ids)] + [copied]
            while self._saved_bytes > _SAVED:
                self._saved.pop(0)

    def _longest(self, ids: Tensor) -> tuple[int, _Text | None]:
        """Return the longest usable prefix and its saved text, which becomes the latest used."""
        shared, best = max(((_shared(ids, text.ids), i) for i, text in enumerate(self._saved)), default=(0, 0))
        if not shared:
            return 0, None
        found = self._saved.pop(best)
        if shared < len(found.ids):
            self._saved.append(found)
        return shared, found


def _on_host(entries: Tensor) -> Tensor:
    return torch.empty(entries.shape, dtype=entries.dtype).copy_(entries)


def _text_in(pooled: _Pooled) -> _Text:
    assert pooled.ids is not None, "there is a text"
    return _Text(pooled.ids, pooled.cache.prefix(len(pooled.ids)))


def _shared(ids: Tensor, text: Tensor) -> int:
    """Return how many of a text's entries a prompt can reuse, 0 if too few."""
    usable = min(len(text), len(ids) - LEAST_PREFIX)
    if usable < LEAST_PREFIX:
        return 0
    others = (ids[:usable] != text[:usable]).nonzero()
    shared = int(others[0]) if len(others) else usable
    return shared if shared >= LEAST_PREFIX else 0


def _key(model: PreTrainedModel, rows: int) -> tuple[Hashable, ...]:
    """Return the properties that a cache's tensors depend on besides its length."""
    device = model.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return rows, model.dtype, device, autocast, torch.is_inference_mode_enabled()
