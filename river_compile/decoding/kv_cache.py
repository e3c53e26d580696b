"""Static KV caches with a full layer for every layer of a model.

Not handled: models that keep more than keys and values (recurrent states, convolutions, indexers), which use
transformers' cache.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer, StaticLayer

from river_compile.upstream.transformers import allocate, full_static_cache

_WINDOW_MASKS = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")  # transformers' functions
Entries: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # of one row, by layer: keys and values ``[H, T, D]``
_STEP = 256  # slots are a multiple of this, so that prompts of similar lengths fit into the same cache
_RESERVED = 2  # rows at most that OPT and its like keep in front of their table of positions


def masks_by_slots(model: PreTrainedModel) -> bool:
    """Whether attention cuts its masks out of a square buffer by the number of keys, as GPT-Neo's does."""
    # The last key is then taken for the newest token's; a static cache has empty slots behind that.
    return any(b.dtype == torch.bool and b.dim() == 4 and b.shape[-1] == b.shape[-2] for b in model.buffers())


def ignores_windows(model: PreTrainedModel) -> bool:
    """Whether a sliding cache alone limits what attention sees, and no mask does, as in Moshi."""
    # Entries that such a cache drops are seen by a long prompt, and by every step on a full cache.
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if not any(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers):
        return False
    homes = (sys.modules.get(type(module).__module__) for module in model.modules())  # nearly always, the first has one
    return not any(hasattr(home, name) for home in homes for name in _WINDOW_MASKS)


def needs_own_cache(model: PreTrainedModel) -> str:
    """Return what ties a model to the cache that transformers makes for it; empty if a full static one will do."""
    kind = type(model).__name__
    if masks_by_slots(model) and not model._can_compile_fullgraph:
        return f"{kind}, whose masks count the slots of the KV cache"
    return f"{kind}, which sees what its sliding KV cache holds" if ignores_windows(model) else ""


def other_layers(cache: Cache) -> list[str]:
    """Return the kinds of a cache's layers that do not keep a slot for every token."""
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer})


def why_no_rewind(model: PreTrainedModel, cache: Cache | None = None) -> str:
    """Return why exact mode cannot remove rejected tokens of a model (and a cache of its); empty where it can."""
    kind, layers = type(model).__name__, other_layers(cache) if cache is not None else []
    if model._is_stateful:
        kept = f"the recurrent state of {kind} does"
    elif own := needs_own_cache(model):
        kept = f"{own}, does"
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
        self.states: dict[tuple[int, int], Any] = {}  # by rows and width of a pass: bound for later calls
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

    def prefix(self, tokens: int) -> Entries:
        """Return views of the first row's first entries."""
        return [(layer.keys[0, :, :tokens], layer.values[0, :, :tokens]) for layer in self.whole.layers]

    def begin_with(self, tokens: int, parts: Sequence[Entries] = ()) -> None:
        """Keep only the first entries: the cache's own, or those of one row in parts, the first ones of them."""
        # Slots are zeroed, since attention may multiply hidden ones by 0.
        for number, layer in enumerate(self.whole.layers):
            for place, entries in enumerate(_tensors(layer)):
                entries[:, :, tokens:].zero_()
                first = 0
                for part in parts:
                    new = part[number][place][:, : tokens - first]
                    entries[0, :, first : first + new.shape[1]].copy_(new)
                    first += new.shape[1]
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


def bytes_per_token(model: PreTrainedModel) -> int | None:
    """Return the bytes of keys and values of one token, None if the cache's shapes show in the first pass only."""
    cache = KVCache.of(model, _STEP)
    return cache.bytes // _STEP if cache.is_full and cache.memory_rows else None


def slots_for(model: PreTrainedModel, tokens: int) -> int:
    """Return the slots for some tokens, rounded up; at most as many as the model has positions."""
    return min(-(-tokens // _STEP) * _STEP, positions_of(model))


def positions_of(model: PreTrainedModel) -> int:
    """Return how many positions a model has embeddings or a bias for, as GPT-2 and MPT; else the largest number."""
    # The padding of a verifying pass has positions too, as far as there are slots.
    config = model.config.get_text_config(decoder=True)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int):
        others = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not model.get_input_embeddings())
        if any(most <= table.num_embeddings <= most + _RESERVED for table in others):
            return most
    return getattr(config, "max_seq_len", None) or sys.maxsize
