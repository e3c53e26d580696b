"""A KV cache whose last entries can be freed again, as drafts and rejected tokens are.

Full attention layers only count back. A sliding window that grows remembers what left it. A static one is written in
place and forgets: once it is full, the entries that the next tokens will push out are copied beforehand.

Rows that give back other numbers of tokens are moved to end in the same slot again. Positions are in the entries, not
in the slots, so moving them is legal; what a row gets before its entries is to be masked as padding. That reads
and writes the cache twice.

Not handled (refused by name): recurrent states and whatever else cannot go back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from river_compile.errors import ExactModeError
from river_compile.upstream.transformers import (
    cannot_crop,
    crop_layer,
    remember_past,
    rows_can_part,
    set_length,
    slots_needed,
)

# Arguments of a forward whose last dimension is that of the ids.
BY_SLOT = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


class RewindableCache:
    """Counts a cache's entries and frees the last of them.

    Args:
        cache: filled with a prompt.

    Attributes:
        filled: tokens that the cache holds.
        capacity: tokens that it can hold, None where no limit applies.
        grows: whether a layer of it is no static one.
        in_place: tokens up to which a pass changes nothing that is in the cache; 0 where a layer grows.
    """

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.filled = int(cache.get_seq_length())  # counted from here on: reading it back would wait
        static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
        self.grows = len(static) < len(cache.layers)
        self._longest, self._strict = 1, False
        self._static_windows = [layer for layer in static if isinstance(layer, StaticSlidingWindowLayer)]
        slots = [layer.max_cache_len for layer in static if layer not in self._static_windows]
        self.capacity: int | None = min(slots, default=None)
        growing = [layer.sliding_window for layer in cache.layers if hasattr(layer, "sliding_window")]
        self._sizes = sorted({*growing, *(layer.max_cache_len for layer in self._static_windows)})
        self.in_place = 0 if self.grows else min((layer.max_cache_len for layer in static), default=0)
        self._lengths = [layer.cumulative_length for layer in static if layer not in self._static_windows]
        self._all_full = len(self._lengths) == len(cache.layers)  # no windows
        self._marked = self.filled
        self._ahead: dict[int, tuple[Tensor, ...]] = {}  # of full windows, what the next tokens push out one by one

    def allow_rewinds(self, longest: int, strict: bool = False) -> None:
        """Saves the state that a rewind restores.

        Args:
            longest: most tokens that are ever written between two calls of :meth:`mark`.
            strict: whether there is room for one token alone where a static window is full: several see it in other
                slots than one, and what attention sums depends on the slots.

        Raises:
            ExactModeError: a layer cannot give entries back.
        """
        lasting = cannot_crop(self.cache)
        if lasting:
            raise ExactModeError(
                "exact mode rewinds the KV cache after every draft, and this cache cannot give entries back "
                f"({', '.join(lasting)}); it works with attention and convolution layers"
            )
        remember_past(self.cache)
        self._longest, self._strict = longest, strict
        self.mark()

    def lacks_room(self, tokens: int) -> bool:
        """Returns whether so many more tokens do not fit."""
        return self.capacity is not None and self.filled + tokens > self.capacity

    @property
    def room(self) -> int:
        """How many tokens can be written before the next mark; a pass ends when a static window is full."""
        rooms = [self._longest]
        if self.capacity is not None:
            rooms.append(self.capacity - self.filled)
        for layer in self._static_windows:
            size = layer.max_cache_len
            rooms.append(size - self.filled if self.filled < size else 1 if self._strict else size)
        return min(rooms)

    def phase(self, width: int) -> tuple[object, ...]:
        """Returns what graphs of passes of one width differ in: whether windows are full before and after it.

        Where one becomes full on the way it counts its tokens in Python, so the graph is one for their number alone.
        """
        phase = tuple((self.filled >= size, self.filled + width > size) for size in self._sizes)
        return (*phase, self.filled) if (False, True) in phase else phase

    @property
    def stays(self) -> bool:
        """Whether every layer is a static one of full attention, whose memory other passes may know."""
        return self._all_full

    @property
    def can_part(self) -> bool:
        """Whether rows may give back other numbers of tokens: every layer keeps keys and values alone."""
        return all(rows_can_part(layer) for layer in self.cache.layers)

    def mark(self) -> None:
        """Makes the entries that the cache holds now those that a rewind can return to."""
        self._marked = self.filled
        self._ahead.clear()
        for i, layer in enumerate(self.cache.layers if self._static_windows else ()):
            if layer in self._static_windows and self.filled >= layer.max_cache_len:
                self._ahead[i] = tuple(tensor[:, :, : self._longest].clone() for tensor in (layer.keys, layer.values))

    def rewind(self, tokens: int) -> None:
        """Frees the last tokens, all of them written since the last mark."""
        added, self.filled = self.filled - self._marked, self.filled - tokens
        if not (self.grows or tokens):
            return
        if self._all_full:
            torch._foreach_sub_(self._lengths, tokens)
            return
        for i, layer in enumerate(self.cache.layers):
            if i in self._ahead:
                for now, before in zip((layer.keys, layer.values), self._ahead[i], strict=True):
                    kept = layer.max_cache_len - tokens
                    now.copy_(torch.cat([before[:, :, added - tokens : added], now[:, :, :kept]], dim=2))
                layer.cumulative_length_int -= tokens
            else:
                crop_layer(layer, tokens)  # (even for none, this trims a sliding window that grows)
            if self.grows:  # a cropped view has other strides than a grown cache, and graphs depend on them
                for held, name in tensors_of(layer):
                    held[name] = held[name].contiguous()

    def part(self, freed: Sequence[int], filled: int) -> None:
        """Frees the last tokens of each row, all written since the last mark, and makes all rows end in one slot.

        Args:
            freed: tokens of each row.
            filled: tokens that the cache holds afterwards. Rows that have fewer get filler before them, those that
                have more lose their first ones.
        """
        added, used, self.filled = self.filled - self._marked, self.filled, filled
        move = _Move(freed)
        for i, layer in enumerate(self.cache.layers):
            for number, (held, name) in enumerate(tensors_of(layer)):
                tensor = held[name]
                if i in self._ahead:
                    whole = torch.cat([self._ahead[i][number][:, :, :added], tensor], dim=2)
                    moved = move(whole, whole.shape[2], min(filled, layer.max_cache_len))
                elif isinstance(layer, StaticLayer):
                    moved = move(tensor, used, filled)
                else:
                    moved = move(tensor, tensor.shape[2], slots_needed(layer, filled))
                if isinstance(layer, StaticLayer):
                    tensor[:, :, : moved.shape[2]].copy_(moved)
                else:
                    held[name] = moved
            set_length(layer, filled)


class _Move:
    """Takes the last entries of each row but the ones that it frees.

    Args:
        freed: tokens of each row.
    """

    def __init__(self, freed: Sequence[int]) -> None:
        self._freed = freed
        self._indices: dict[tuple[int, ...], Tensor] = {}  # nearly all layers have the same

    def __call__(self, tensor: Tensor, used: int, count: int) -> Tensor:
        """Returns ``[B, H, count, D]`` of the first `used` slots of ``[B, H, S, D]``; filler stands before few."""
        rows, heads, slots, width = tensor.shape
        key = (rows, heads, slots, used, count)
        if key not in self._indices:
            device = tensor.device
            firsts = torch.tensor([used - count - freed for freed in self._freed], device=device)
            within = (firsts[:, None] + torch.arange(count, device=device)).clamp_(min=0)
            blocks = torch.arange(rows * heads, device=device).view(rows, heads, 1) * slots
            self._indices[key] = (blocks + within[:, None]).flatten()
        flat = tensor.reshape(rows * heads * slots, width)
        return flat.index_select(0, self._indices[key]).view(rows, heads, count, width)


def moved_inputs(kwargs: Mapping[str, object], freed: Sequence[int], fewer: int) -> dict:
    """Returns a forward's arguments with each row moved to the right over the columns that it frees.

    Args:
        kwargs: as `generate` keeps them, for the longest row.
        freed: last columns of each row that do not count.
        fewer: columns that go at the left.
    """
    moved = dict(kwargs)
    for name in BY_SLOT:
        held = moved.get(name)
        if isinstance(held, Tensor):
            columns = torch.arange(held.shape[-1], device=held.device)
            index = columns[fewer:] - torch.tensor(freed, device=held.device)[:, None]
            shape = (*held.shape[:-1], index.shape[-1])
            new = held.gather(-1, index.clamp(min=0).expand(shape))
            moved[name] = new.masked_fill(index < 0, 0) if name == "attention_mask" else new
    return moved


def joined_inputs(kwargs: Mapping[str, object], others: Mapping[str, object]) -> dict:
    """Returns a forward's arguments, as `generate` keeps them, for the rows of both; all end in the same column."""
    joined = dict(kwargs)
    for name in BY_SLOT:
        held, other = kwargs.get(name), others.get(name)
        if isinstance(held, Tensor) and isinstance(other, Tensor):
            most = max(held.shape[-1], other.shape[-1])
            joined[name] = torch.cat([pad(t, (most - t.shape[-1], 0)) for t in (held, other)], dim=-2)
    return joined


def selected_inputs(kwargs: Mapping[str, object], rows: Sequence[int]) -> dict:
    """Returns a forward's arguments, as `generate` keeps them, for some of the rows."""
    selected = dict(kwargs)
    for name in BY_SLOT:
        held = selected.get(name)
        if isinstance(held, Tensor):  # (positions of three kinds stand before the rows)
            selected[name] = held.index_select(held.ndim - 2, torch.tensor(rows, device=held.device))
    return selected


def tensors_of(layer: object) -> Iterator[tuple[dict, Any]]:
    """Yields the places of a cache layer's tensors, as a dict and a key: keys, values, a convolution's inputs.

    (A recurrent state cannot be rewound, so no such layer comes here.)
    """
    attributes = vars(layer)
    for held, names in ((attributes, ("keys", "values")), (states := attributes.get("conv_states", {}), states)):
        yield from ((held, name) for name in names if isinstance(held.get(name), Tensor))
