"""KV caches of generate: static ones with a full layer for every layer of a model, and what outlasts a call.

A full layer holds an entry for every token. A sliding window is a mask over it (transformers makes the mask of each
kind of attention by the sizes that layers state), so every cache can free its last entries, hold several rows that end
at one slot, and begin with the first entries of another text, whatever the model's windows.

Captures belong to the memory of one cache, so a model keeps that of its latest call, and the text in it. Passes of few
positions sum attention in another order than a prompt (``kFewPositions`` of `kernels/native/sources/tensors.h`), so
what is left of a prompt is always so wide that it runs as a whole prompt does.

Not handled: models that keep more than keys and values (recurrent states, convolutions, indexers), which generate in
the cache that transformers makes; entries that a text shares with another one, which are saved with each.
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

LEAST_PREFIX = 17  # positions that run as those of a longer prompt do; fewer entries are not worth keeping
_AHEAD = 512  # new tokens that a cache has slots for at first
_STEP = 256  # slots are a multiple of this, so that prompts of similar lengths find room in the same cache
# Bytes of all saved prefixes: some twenty conversations of 1,000 tokens of a small model (SmolLM2: 23 kB a token), four
# of one of 8B parameters (131 kB), and less than a tenth of the memory of a machine that runs it.
_SAVED = 512 * 2**20


class KVCache:
    """A KV cache, of which the first rows are in use.

    Args:
        cache: transformers' object. Where a layer is no full static one, its tokens are counted and nothing else.

    Attributes:
        cache: the same, or a view of its rows that are in use.
        slots, filled: tokens that it can hold, and that it holds.
        rows: in use; 0 before it has memory.
        states: the programs that are bound to its memory (`StepState`), by rows and width of a pass.
    """

    def __init__(self, cache: Cache) -> None:
        self.whole = self.cache = cache
        self.is_full = all(type(layer) is StaticLayer for layer in cache.layers)
        self.slots = cache.layers[0].max_cache_len if self.is_full else sys.maxsize
        self.states: dict[tuple[int, int], Any] = {}
        self.take_in()

    def take_in(self) -> None:
        """Looks at what transformers has done with the cache; its tokens are counted from here on."""
        self.filled = int(self.cache.get_seq_length())  # (which waits for the device)
        self.rows = self.memory_rows

    @classmethod
    def of(cls, model: PreTrainedModel, slots: int, rows: int = 1) -> KVCache:
        """Returns a new cache for a model, with its memory where the shapes of its heads are certain."""
        made = cls(full_static_cache(model, slots))
        if made.is_full:
            allocate(made.whole, model, rows)
            made.rows = made.memory_rows
        return made

    def like(self, slots: int, rows: int) -> KVCache:
        """Returns an empty cache of the same heads."""
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
        """Frees the last entries."""
        if tokens:
            torch._foreach_sub_([layer.cumulative_length for layer in self.whole.layers], tokens)
            self.filled -= tokens

    def grow(self, slots: int) -> None:
        """Moves to memory of so many slots."""
        before, self.whole = self.whole, self.like(slots, self.memory_rows).whole
        self.states, self.slots = {}, slots
        for old, new in zip(before.layers, self.whole.layers, strict=True):
            for entries, here in zip(_tensors(old), _tensors(new), strict=True):
                here[:, :, : self.filled].copy_(entries[:, :, : self.filled])
        self._set_filled(self.filled)
        self._show(self.rows)

    def select(self, rows: Sequence[int]) -> None:
        """Goes on with some of the rows: each stays, or comes from behind these to the place of one that leaves."""
        moves = [(place, row) for place, row in enumerate(rows) if row != place]
        assert all(row >= len(rows) for _, row in moves), "no row is written over"
        for layer in self.whole.layers if moves else ():
            for tensor in _tensors(layer):
                for place, row in moves:
                    tensor[place].copy_(tensor[row])
        self._show(len(rows))

    def join(self, other: KVCache) -> None:
        """Takes the row of another cache in as the last one; all rows end at the slot of the one with more tokens.

        Positions are in the entries, not in the slots, so entries may move; what stands before them is to be masked.
        """
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
        """Returns the first entries of the first row in each layer ``[H, tokens, D]``, as views."""
        return [(layer.keys[0, :, :tokens], layer.values[0, :, :tokens]) for layer in self.whole.layers]

    def begin_with(self, tokens: int, prefix: Sequence[tuple[Tensor, Tensor]] | None = None) -> None:
        """Empties the cache but for the first entries: its own, or those of a prefix of one row.

        (Slots are zeroed: what a mask hides may be multiplied by 0 all the same.)
        """
        for number, layer in enumerate(self.whole.layers):
            for place, entries in enumerate(_tensors(layer)):
                entries[:, :, tokens:].zero_()
                if prefix is not None:
                    entries[0, :, :tokens].copy_(prefix[number][place][:, :tokens])
        self._set_filled(tokens)
        self._show(self.memory_rows)

    def copy_to(self, cache: Cache) -> None:
        """Puts all entries of the rows in use into an empty cache of any kind."""
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
    """Tokens on the host, and their entries in each layer, which may be views of a cache."""

    ids: Tensor
    entries: Sequence[tuple[Tensor, Tensor]]

    def copied(self) -> _Text:
        """Returns a copy in the host's memory, the device's being the model's."""
        return _Text(self.ids, [(_on_host(keys), _on_host(values)) for keys, values in self.entries])

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for pair in self.entries for t in pair)

    def begins_with(self, ids: Tensor) -> bool:
        return len(self.ids) >= len(ids) and torch.equal(self.ids[: len(ids)], ids)


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


class _Pooled(NamedTuple):
    """A cache between two calls: its kind, and the tokens of the text in it."""

    key: tuple[Hashable, ...]
    cache: KVCache
    ids: Tensor | None


class PrefixPool:
    """What a model keeps between calls: at most one cache with the text in it, and saved texts up to some bytes.

    A prompt that begins with a text has its entries already. One that gives way to another is saved beside the cache,
    and copied back in where a prompt begins with more of it than of the one in place. All are texts of one state of the
    model; a call that finds another state forgets them. Of calls at the same time one gets the cache.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._pooled: _Pooled | None = None
        self._saved: list[_Text] = []  # in the order of their last use
        self._state: object | None = None  # of the model, which all texts are of
        self._reused = 0

    def acquire(
        self, model: PreTrainedModel, rows: int, tokens: int, ids: Tensor | None = None, state: object | None = None
    ) -> tuple[KVCache, int]:
        """Returns a cache for a call, and how many tokens of its prompt have entries in it; nothing else is in it.

        `ids` are those of a prompt that may begin with a text that this `state` of the model made; None where not.
        Where the state is not known, or another one, nothing stays bound to the cache.
        """
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
        slots, fits = slots_for(model, tokens + _AHEAD), False
        if pooled is None or pooled.key[1:] != key[1:]:
            cache = KVCache.of(model, slots, rows)
        else:
            fits = pooled.key == key and pooled.cache.slots >= min(tokens + _AHEAD // 2, slots)
            cache = pooled.cache if fits else pooled.cache.like(slots, rows)
        if not cache.memory_rows:
            shared, source = 0, None
        if source is not None:
            cache.begin_with(shared, None if source is text and fits else source.entries)
        elif fits:
            cache.begin_with(0)
        with self._lock:
            self._reused += shared
        return cache, shared

    def release(
        self, model: PreTrainedModel, cache: KVCache, ids_BS: Tensor | None, prompt: int, state: object | None
    ) -> None:
        """Keeps a cache in the place of the one before, with the text that a state of the model made in it.

        Where a row of a pass has the same bits whatever their number, only the prompt's entries stay: a later prompt
        that has the new tokens too makes other ones of them. `ids_BS` have entries; None keeps no text.
        """
        if not (cache.is_full and cache.memory_rows):
            return
        if state is None:  # (nothing tells whether a later call finds the same)
            cache.states.clear()
        ids = None if ids_BS is None else ids_BS[0]
        if ids is not None and model.device.type == "cpu" and any_rows(model.dtype):
            ids = ids[:prompt]
        keeps = ids is not None and len(ids) >= LEAST_PREFIX
        with self._lock:
            self._model = self._model or self._freed_with(model)
            text = ids.cpu() if ids is not None and keeps and state is not None and state == self._state else None
            others, self._pooled = self._pooled, _Pooled(_key(model, cache.memory_rows), cache, text)
        if others is not None and others.ids is not None:  # (of a call at the same time)
            self._save(_text_in(others))

    def forget_texts(self) -> None:
        """Has the next call take a fresh prompt."""
        with self._lock:
            self._forget(None)

    def free(self) -> int:
        """Lets go of the cache and all texts; returns how many bytes that frees."""
        held = self.bytes + self.texts.saved_bytes
        with self._lock:
            self._pooled = None
            self._forget(None)
        return held

    def _freed_with(self, model: PreTrainedModel) -> weakref.ref[PreTrainedModel]:
        """Returns a reference that empties the pool as the model goes, whose weights the cache's states hold."""
        mine = weakref.ref(self)

        def free(_: object) -> None:
            pool = mine()
            if pool is not None:
                pool.free()

        return weakref.ref(model, free)

    @property
    def bytes(self) -> int:
        """The bytes of the cache, 0 where a call has it."""
        pooled = self._pooled
        return 0 if pooled is None else pooled.cache.bytes

    @property
    def texts(self) -> KeptTexts:
        """What is kept of them now."""
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
        """Saves a copy of a text, made in the state of the model that the latest call found, unless another has it."""
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
        """Returns how many saved entries a prompt can begin with at most, and the text that has them.

        The text is the one that was used last from now on; one that the prompt has as a whole goes.
        """
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
    """Returns how many of a text's entries a prompt can begin with, 0 where that is not worth it."""
    usable = min(len(text), len(ids) - LEAST_PREFIX)
    if usable < LEAST_PREFIX:
        return 0
    others = (ids[:usable] != text[:usable]).nonzero()
    shared = int(others[0]) if len(others) else usable
    return shared if shared >= LEAST_PREFIX else 0


def slots_for(model: PreTrainedModel, tokens: int) -> int:
    """Returns a number of slots that many texts have in common; no more than a model has positions (MPT's bias)."""
    return min(-(-tokens // _STEP) * _STEP, getattr(model.config, "max_seq_len", None) or sys.maxsize)


def _key(model: PreTrainedModel, rows: int) -> tuple[Hashable, ...]:
    """Returns what a cache's tensors depend on beside its length."""
    device = model.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    return rows, model.dtype, device, autocast, torch.is_inference_mode_enabled()
