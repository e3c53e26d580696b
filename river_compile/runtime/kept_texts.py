"""Texts whose keys and values outlast a call of generate: a prompt that begins with one runs only what is new.

A prompt's pass of few positions sums attention in another order than one of many (``kFewPositions`` of
`kernels/native/sources/tensors.h`), and so do decode steps. So what is left of a prompt is always as wide that it runs
as the whole prompt would: where rows have the same bits whatever their number, its entries are the whole prompt's to
the bit. A text says how many of its entries are.

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
class Text:
    """The tokens that have entries, on the host.

    Attributes:
        ids: the tokens.
        prompt: how many of the first ones have the entries that any prompt of `MANY` tokens gives them, to the bit.
    """

    ids: Tensor
    prompt: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompt:
    """The prompt of a call that may begin with a kept text, and leave one.

    Attributes:
        ids: its tokens, on the host.
        state: returns what entries depend on beside the tokens, None where that is not known.
        to_the_bit: whether entries must be those that the prompt itself would make.
    """

    ids: Tensor
    state: Callable[[], object | None]
    to_the_bit: bool = False

    def shares(self, text: Text) -> int:
        """Returns how many of a text's entries the prompt can begin with, 0 where that is not worth it."""
        usable = min(text.prompt if self.to_the_bit else len(text), len(self.ids) - MANY)
        if usable < MANY:
            return 0
        others = (self.ids[:usable] != text.ids[:usable]).nonzero()
        shared = int(others[0]) if len(others) else usable
        return shared if shared >= MANY else 0


@dataclass(frozen=True)
class SavedText:
    """A text and its entries in each layer, which may be views of a cache."""

    text: Text
    layers: Sequence[LayerEntries]

    @classmethod
    def of(cls, text: Text, cache: Cache) -> SavedText:
        """Returns a text in a cache of one row."""
        return cls(text, entries_of(cache, len(text)))

    def copied(self) -> SavedText:
        """Returns a copy in the host's memory."""
        return SavedText(self.text, [layer.copied() for layer in self.layers])

    @property
    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def begins_with(self, text: Text) -> bool:
        """Whether all entries of a text are among these, and as many of them a prompt's."""
        n = len(text)
        return len(self.text) >= n and self.text.prompt >= text.prompt and torch.equal(self.text.ids[:n], text.ids)


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
        return [len(saved.text) for saved in self._texts]

    @property
    def bytes(self) -> int:
        return sum(saved.bytes for saved in self._texts)

    def clear(self) -> None:
        self._texts = []

    def lacks(self, text: SavedText) -> bool:
        """Whether a text is worth to be added: none begins with it, and it is not too large."""
        return text.bytes <= self._bound and not any(saved.begins_with(text.text) for saved in self._texts)

    def add(self, new: SavedText) -> None:
        """Adds a text; those that it begins with, and the oldest beyond the bound, go."""
        self._texts = [saved for saved in self._texts if not new.begins_with(saved.text)] + [new]
        while self.bytes > self._bound:
            self._texts.pop(0)

    def longest(self, prompt: Prompt) -> tuple[int, SavedText | None]:
        """Returns how many entries a prompt can begin with at most, and the text that has them, which was used now."""
        shared, best = max(((prompt.shares(saved.text), i) for i, saved in enumerate(self._texts)), default=(0, 0))
        if not shared:
            return 0, None
        found = self._texts.pop(best)
        self._texts.append(found)
        return shared, found
