"""Static KV caches with a full layer for every layer of a model, and the prefix cache of a model's calls.

Not handled: models that keep more than keys and values (recurrent states, convolutions, indexers), which use
transformers' cache; sharing entries between saved texts.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from river_compile.kernels.native.load import any_rows
from river_compile.upstream.transformers import allocate, full_static_cache

# Passes of few positions sum attention in another order than a prompt (`kFewPositions` of
# kernels/native/sources/tensors.h), so at least this much of a prompt runs. Fewer entries are not worth keeping.
LEAST_PREFIX = 17
_AHEAD = 512  # new tokens that a new cache has slots for
_STEP = 256  # slots are a multiple of this, so that prompts of similar lengths fit into the same cache
# Bytes of all saved texts. They hold about twenty conversations of 1,000 tokens with SmolLM2 (23 kB a token), or four
# with a model of 8B parameters (131 kB). That is less than a tenth of the memory of a machine that runs it.
_SAVED = 512 * 2**20


def masks_by_slots(model: PreTrainedModel) -> bool:
    """Whether attention cuts its masks out of a square buffer by the number of keys, as GPT-Neo's does."""
    # The last key is then taken for the newest token's; a static cache has empty slots behind that.
    return any(b.dtype == torch.bool and b.dim() == 4 and b.shape[-1] == b.shape[-2] for b in model.buffers())


def other_layers(cache: Cache) -> list[str]:
    """Return the kinds of a cache's layers that do not keep a slot for every token."""
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer})


def why_no_rewind(model: PreTrainedModel, cache: Cache | None = None) -> str:
    """Return why exact mode cannot remove rejected tokens of a model (and a cache of its); empty where it can."""
    kind, layers = type(model).__name__, other_layers(cache) if cache is not None else []
    if model._is_stateful:
        kept = f"the recurrent state of {kind} does"
    elif masks_by_slots(model) and not model._can_compile_fullgraph:
        kept = f"{kind}, whose masks count the slots of the KV cache, does"
    elif layers:
        kept = f"KV cache layers of kind {', '.join(layers)} do"
    else:
        return ""
    return f"Exact mode removes rejected tokens, which {kept} not allow"


class KVCache:
    """A KV cache whose first rows are in use."""

    # A full layer has an entry for every token, and a sliding window is a mask over it. So any cache can free its last
    # entries, hold rows that end at one slot, and begin with entries of another text.
    def __init__(self, cache: Cache) -> None:
        self.whole = self.cache = cache  # `cache` is a view of the rows in use
        # Of other caches only the tokens are counted.
        self.is_full = not other_layers(cache)
        self.slots = cache.layers[0].max_cache_len if self.is_full else sys.maxsize
        self.states: dict[tuple[int, int], Any] = {}  # of a session: bound states by rows and width of a pass
        self.take_in()

    def take_in(self) -> None:
        """Read the length and rows from transformers' cache; waits for the device."""
        self.filled = int(self.cache.get_seq_length())  # tokens; counted from here on
        self.rows = self.memory_rows  # in use; 0 before allocation

    @classmethod
    def of(cls, model: PreTrainedModel, slots: int, rows: int = 1) -> KVCache:
        """Return a new cache for a model, allocated if the shapes of its heads are certain."""
        made = cls(full_static_cache(model, slots))
        if made.is_full:
            allocate(made.whole, model, rows)
            made.rows = made.memory_rows
        return made

    def like(self, slots: int, rows: int) -> KVCache:
        """Return an empty cache of the same heads."""
        whole = copy.copy(self.whole)
        whole.layers = [StaticLayer(max_cache_len=slots) for _ in whole.layers]
        for layer, known in zip(whole.layers, self.whole.layers, strict=True):
            layer.lazy_initialization(*(t[:1, :, :0].expand(rows, -1, -1, -1) for t in _tensors(known)))
        return KVCache(whole)

    @property
    def free_slots(self) -> int:
        return self.slots - self.filled

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for layer in self.whole.layers for tensor in _tensors(layer) if tensor is not None)

    @property
    def memory_rows(self) -> int:
        keys = getattr(self.whole.layers[0], "keys", None)
        return 0 if keys is None else len(keys)

    def rewind(self, tokens: int) -> None:
        """Free the last entries."""
        if tokens:
            torch._foreach_sub_([layer.cumulative_length for layer in self.whole.layers], tokens)
            self.filled -= tokens

    def grow(self, slots: int) -> None:
        """Move to memory with this many slots."""
        before, self.whole = self.whole, self.like(slots, self.memory_rows).whole
        self.states, self.slots = {}, slots
        for old, new in zip(before.layers, self.whole.layers, strict=True):
            for entries, here in zip(_tensors(old), _tensors(new), strict=True):
                here[:, :, : self.filled].copy_(entries[:, :, : self.filled])
        self._set_filled(self.filled)
        self._show(self.rows)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows: each stays, or moves from behind them to the place of one that is dropped."""
        moves = [(place, row) for place, row in enumerate(rows) if row != place]
        assert all(row >= len(rows) for _, row in moves), "no row is overwritten"
        for layer in self.whole.layers if moves else ():
            for tensor in _tensors(layer):
                for place, row in moves:
                    tensor[place].copy_(tensor[row])
        self._show(len(rows))

    def join(self, other: KVCache) -> None:
        """Add another cache's row as the last one; all rows end at the slot of the longer one."""
        # Positions are in the entries, not in the slots, so entries may move; the mask hides the slots before them.
        end = max(self.filled, other.filled) if self.rows else other.filled
        more = end - self.filled if self.rows else 0
        for here, there in zip(self.whole.layers, other.whole.layers, strict=True):
            for entries, new in zip(_tensors(here), _tensors(there), strict=True):
                if more:
                    entries[: self.rows, :, more:end] = entries[: self.rows, :, : self.filled].clone()
                entries[self.rows, :, end - other.filled : end] = new[0, :, : other.filled]
        self._set_filled(end)
        self._show(self.rows + 1)

    def prefix(self, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Return views of the first row's first entries by layer: keys and values ``[H, tokens, D]``."""
        return [(layer.keys[0, :, :tokens], layer.values[0, :, :tokens]) for layer in self.whole.layers]

    def begin_with(self, tokens: int, prefix: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        """Keep only the first entries: the cache's own, or those of a one-row prefix."""
        # Slots are zeroed, since attention may multiply hidden ones by 0.
        for number, layer in enumerate(self.whole.layers):
            for place, entries in enumerate(_tensors(layer)):
                entries[:, :, tokens:].zero_()
                if prefix is not None:
                    entries[0, :, :tokens].copy_(prefix[number][place][:, :tokens])
        self._set_filled(tokens)
        self._show(self.memory_rows)

    def copy_to(self, cache: Cache) -> None:
        """Copy the entries of the rows in use into an empty cache of any kind."""
        for number, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[:, :, : self.filled].clone(), layer.values[:, :, : self.filled].clone(), number)

    def _set_filled(self, tokens: int) -> None:
        self.filled = tokens
        for layer in self.whole.layers:
            layer.cumulative_length.fill_(tokens)

    def _show(self, rows: int) -> None:
        self.rows, self.cache = rows, self.whole
        if rows < self.memory_rows:
            self.cache = copy.copy(self.whole)
            self.cache.layers = [_front(layer, rows) for layer in self.whole.layers]


def _tensors(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _front(layer: Any, rows: int) -> Any:
    view = copy.copy(layer)
    view.keys, view.values, view.batch_size = layer.keys[:rows], layer.values[:rows], rows
    return view


class _Text(NamedTuple):
    """Token ids on the host, and their entries by layer, which may be views of a cache."""

    ids: Tensor
    entries: Sequence[tuple[Tensor, Tensor]]

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
        self._lock = threading.Lock()
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._pooled: _Pooled | None = None
        self._saved: list[_Text] = []  # least recently used first
        self._state: object | None = None  # of the model, for all texts
        self._reused = 0

    def acquire(
        self, model: PreTrainedModel, rows: int, tokens: int, ids: Tensor | None = None, state: object | None = None
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
        if source is not None:
            cache.begin_with(shared, None if source is text and is_reusable else source.entries)
        elif is_reusable:
            cache.begin_with(0)
        with self._lock:
            self._reused += shared
        return cache, shared

    def release(
        self, model: PreTrainedModel, cache: KVCache, ids_BS: Tensor | None, prompt: int, state: object | None
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
            text = ids.cpu() if ids is not None and keeps and state is not None and state == self._state else None
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
            return KeptTexts(len(lengths), sum(lengths), self._saved_bytes, self._reused)

    @property
    def _saved_bytes(self) -> int:
        return sum(text.bytes for text in self._saved)

    def _forget(self, state: object | None) -> None:
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


def slots_for(model: PreTrainedModel, tokens: int) -> int:
    """Return the slots for some tokens, rounded up; at most the model's positions (MPT's bias)."""
    return min(-(-tokens // _STEP) * _STEP, getattr(model.config, "max_seq_len", None) or sys.maxsize)


def _key(model: PreTrainedModel, rows: int) -> tuple[Hashable, ...]:
    """Return the properties that a cache's tensors depend on besides its length."""
    device = model.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return rows, model.dtype, device, autocast, torch.is_inference_mode_enabled()
