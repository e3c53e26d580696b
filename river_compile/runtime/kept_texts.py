"""Texts whose keys and values outlast a call of generate: a prompt that begins with one runs only what is new.

Decode steps and other passes of few positions sum attention in another order than a prompt (``kFewPositions`` of
`kernels/native/sources/tensors.h`). So what is left of a prompt is always so wide that it runs as a whole prompt does.

Saved texts lie in the host's memory, the device's being the model's. Not handled: entries that a text shares with
another one, which are saved with each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from river_compile.upstream.transformers import LayerEntries, entries_of

MANY = 17  # positions that run as those of a longer prompt do; fewer entries are not worth keeping


@dataclass(frozen=True)
class Prompt:
    """The prompt of a call that may begin with a kept text, and leave one.

    Attributes:
        ids: its tokens, on the host.
        state: returns what entries depend on beside the tokens, None where that is not known.
    """

    ids: Tensor
    state: Callable[[], object | None]

    def shares(self, text: Tensor) -> int:
        """Returns how many of a text's entries the prompt can begin with, 0 where that is not worth it."""
        usable = min(len(text), len(self.ids) - MANY)
        if usable < MANY:
            return 0
        others = (self.ids[:usable] != text[:usable]).nonzero()
        shared = int(others[0]) if len(others) else usable
        return shared if shared >= MANY else 0


@dataclass(frozen=True)
class SavedText:
    """A text and its entries in each layer, which may be views of a cache.

    Attributes:
        ids: the tokens that have entries, on the host.
    """

    ids: Tensor
    layers: Sequence[LayerEntries]

    @classmethod
    def of(cls, ids: Tensor, cache: Cache) -> SavedText:
        """Returns a text in a cache of one row."""
        return cls(ids, entries_of(cache, len(ids)))

    def copied(self) -> SavedText:
        """Returns a copy in the host's memory."""
        return SavedText(self.ids, [layer.copied() for layer in self.layers])

    @property
    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def begins_with(self, ids: Tensor) -> bool:
        """Whether these are a text's first tokens, or all."""
        return len(self.ids) >= len(ids) and torch.equal(self.ids[: len(ids)], ids)


class SavedTexts:
    """Saved texts of one state of a model, up to a number of bytes: the one that was not used for longest goes first.

    Args:
        bound: bytes of all.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._texts: list[SavedText] = []  # in the order of their last use

    @property
    def lengths(self) -> list[int]:
        """The tokens of each."""
        return [len(saved.ids) for saved in self._texts]

    @property
    def bytes(self) -> int:
        return sum(saved.bytes for saved in self._texts)

    def clear(self) -> None:
        self._texts = []

    def lacks(self, text: SavedText) -> bool:
        """Whether a text is to be added: none begins with it, and it is neither too short nor too large."""
        covered = any(saved.begins_with(text.ids) for saved in self._texts)
        return len(text.ids) >= MANY and text.bytes <= self._bound and not covered

    def add(self, new: SavedText) -> None:
        """Adds a text; those that it begins with, and the oldest beyond the bound, go."""
        self._texts = [saved for saved in self._texts if not new.begins_with(saved.ids)] + [new]
        while self.bytes > self._bound:
            self._texts.pop(0)

    def longest(self, prompt: Prompt) -> tuple[int, SavedText | None]:
        """Returns how many entries a prompt can begin with at most, and the text that has them.

        The text is the one that was used last from now on; one that the prompt has as a whole goes.
        """
        shared, best = max(((prompt.shares(saved.ids), i) for i, saved in enumerate(self._texts)), default=(0, 0))
        if not shared:
            return 0, None
        found = self._texts.pop(best)
        if shared < len(found.ids):
            self._texts.append(found)
        return shared, found
