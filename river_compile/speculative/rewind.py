"""A KV cache whose last entries can be freed again, as drafts and rejected tokens are.

Full attention layers only count back. A sliding window that grows remembers what left it. A static one is written in
place and forgets: once it is full, the entries that the next tokens will push out are copied beforehand.

Not handled (refused by name): recurrent states and whatever else cannot go back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, StaticLayer, StaticSlidingWindowLayer

from river_compile.errors import ExactModeError
from river_compile.upstream.hf_cache import cannot_crop, crop_layer, remember_past


@dataclass(frozen=True)
class _Ahead:
    """The oldest entries of a full window ``[B, H, n, D]``, which the next n tokens push out one by one."""

    keys: Tensor
    values: Tensor

    def restore(self, layer: StaticSlidingWindowLayer, added: int, freed: int) -> None:
        """Takes the last `freed` of `added` tokens out of a window, in place."""
        kept = layer.max_cache_len - freed
        for now, before in ((layer.keys, self.keys), (layer.values, self.values)):
            now.copy_(torch.cat([before[:, :, added - freed : added], now[:, :, :kept]], dim=2))
        layer.cumulative_length_int -= freed


class RewindableCache:
    """Counts a cache's entries and frees the last of them.

    Args:
        cache: filled with a prompt.
        longest: most tokens that are ever written between two calls of :meth:`mark`.

    Attributes:
        filled: tokens that the cache holds.
        capacity: tokens that it can hold, None where no limit applies.

    Raises:
        ExactModeError: a layer cannot give entries back.
    """

    def __init__(self, cache: Cache, longest: int) -> None:
        lasting = cannot_crop(cache)
        if lasting:
            raise ExactModeError(
                "exact mode rewinds the KV cache after every draft, and this cache cannot give entries back "
                f"({', '.join(lasting)}); it works with attention and convolution layers"
            )
        remember_past(cache)
        self.cache = cache
        self.filled = int(cache.get_seq_length())  # counted from here on: reading it back would wait
        static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
        self._grows = len(static) < len(cache.layers)
        self._longest = longest
        self._static_windows = [layer for layer in static if isinstance(layer, StaticSlidingWindowLayer)]
        slots = [layer.max_cache_len for layer in static if layer not in self._static_windows]
        self.capacity: int | None = min(slots, default=None)
        growing = [layer.sliding_window for layer in cache.layers if hasattr(layer, "sliding_window")]
        self._sizes = sorted({*growing, *(layer.max_cache_len for layer in self._static_windows)})
        self.mark()

    @property
    def room(self) -> int:
        """How many tokens can be written before the next mark; a pass ends where a static window is full."""
        rooms = [self._longest]
        if self.capacity is not None:
            rooms.append(self.capacity - self.filled)
        for layer in self._static_windows:
            size = layer.max_cache_len
            rooms.append(size - self.filled if self.filled < size else size)
        return min(rooms)

    def phase(self, width: int) -> tuple[tuple[bool, bool], ...]:
        """Returns, for each size of window, whether it is full before and after a pass of this width."""
        return tuple((self.filled >= size, self.filled + width > size) for size in self._sizes)

    def mark(self) -> None:
        """Makes the entries that the cache holds now those that a rewind can return to."""
        self._marked = self.filled
        self._ahead: dict[int, _Ahead] = {}
        for i, layer in enumerate(self.cache.layers):
            if layer in self._static_windows and self.filled >= layer.max_cache_len:
                oldest = (tensor[:, :, : self._longest].clone() for tensor in (layer.keys, layer.values))
                self._ahead[i] = _Ahead(*oldest)

    def rewind(self, tokens: int) -> None:
        """Frees the last tokens, all of them written since the last mark."""
        added, self.filled = self.filled - self._marked, self.filled - tokens
        if not (self._grows or tokens):
            return
        for i, layer in enumerate(self.cache.layers):
            if i in self._ahead:
                self._ahead[i].restore(layer, added, tokens)
            else:
                crop_layer(layer, tokens)  # (even for none, this trims a sliding window that grows)
            if self._grows:  # a cropped view has other strides than a grown cache, and graphs depend on them
                for held, name in tensors_of(layer):
                    held[name] = held[name].contiguous()


def tensors_of(layer: object) -> Iterator[tuple[dict, Any]]:
    """Yields where a cache layer holds each of its tensors, as a dict and a key: keys, values, a convolution's inputs.

    (A recurrent state cannot be rewound, so no such layer comes here.)
    """
    attributes = vars(layer)
    for held, names in ((attributes, ("keys", "values")), (states := attributes.get("conv_states", {}), states)):
        yield from ((held, name) for name in names if isinstance(held.get(name), Tensor))
