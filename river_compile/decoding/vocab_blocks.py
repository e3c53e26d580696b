"""The draft vocabulary: the blocks of tokens that a draft may use."""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.kernels.ops import VOCAB_BLOCK
from river_compile.runtime.state import blocks_of

# A draft may use the first quarter of the vocabulary, at most 32,768 tokens: tokenizers number tokens roughly by
# frequency. A missing token only ends the accepted draft there, and the head is a fifth of a draft step's reads in a
# small model, more than half with a large vocabulary. FR-Spec (Zhao et al. 2025, arXiv 2502.14856) uses a corpus's
# most frequent tokens.
_FIRST = 4
_AT_MOST = 32_768
_WHOLE = 8_192  # a smaller vocabulary is not restricted


class VocabBlocks:
    """The vocabulary blocks that a draft may use: the first ones, and those of tokens that occurred."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._chosen = torch.zeros(blocks_of(vocabulary), dtype=torch.bool)
        first = vocabulary if vocabulary <= _WHOLE else min(vocabulary // _FIRST, _AT_MOST)
        self._chosen[: blocks_of(first)] = True
        self._list: Tensor | None = None

    def add(self, ids: Tensor) -> None:
        """Add tokens of the text, integers of any shape; ids outside the vocabulary (images) are clamped."""
        if not ids.is_cpu:  # heads on other devices compute all logits, and reading ids would wait
            return
        blocks = (ids.flatten() // VOCAB_BLOCK).clamp(0, len(self._chosen) - 1)
        if not self._chosen[blocks].all():
            self._chosen[blocks] = True
            self._list = None

    @property
    def numbers(self) -> Tensor:
        """The blocks' numbers, ascending, int32; the same object until one is added."""
        if self._list is None:
            self._list = self._chosen.nonzero().flatten().int()
        return self._list
