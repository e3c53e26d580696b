"""Which logits the river's head computes in a step: all of them, or those of the tokens that a draft may have.

A draft that lacks a token is a draft that does not hold there, no more; the head is a fifth of what a draft step reads
of a small model, and more than half where the vocabulary is large. (FR-Spec, Zhao et al. 2025, arXiv 2502.14856, drafts
with the most frequent tokens of a corpus. Here none is needed: tokenizers number their tokens about as often as they
come, and a text goes on with the tokens that it has.)

Not handled: heads in 16 bits, and others than those of the C++ kernels; they compute all logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.kernels.ops import VOCAB_BLOCK
from river_compile.passes.program import Program

_FIRST = 4  # a draft may have any token of the first quarter of the vocabulary,
_AT_MOST = 32_768  # or of so many
_WHOLE = 8_192  # tokens of a vocabulary that is not worth a choice


class DraftVocab:
    """The tokens that a draft may have: the first ones of the vocabulary, and the neighbours of any that was seen.

    Args:
        vocabulary: V, how many tokens there are.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._chosen = torch.zeros(blocks_of(vocabulary), dtype=torch.bool)
        first = vocabulary if vocabulary <= _WHOLE else min(vocabulary // _FIRST, _AT_MOST)
        self._chosen[: blocks_of(first)] = True
        self._list: Tensor | None = None

    def add(self, ids: Tensor) -> None:
        """Takes in tokens of the text, integers of any shape; some may stand for pictures, outside of the vocabulary.

        Those on a device are left where they are: no head leaves any logits out there, and to read them is to wait.
        """
        if not ids.is_cpu:
            return
        blocks = (ids.flatten() // VOCAB_BLOCK).clamp(0, len(self._chosen) - 1)
        if not self._chosen[blocks].all():
            self._chosen[blocks] = True
            self._list = None

    @property
    def blocks(self) -> Tensor:
        """The blocks of the vocabulary, ascending, int32; the same object until one is added."""
        if self._list is None:
            self._list = self._chosen.nonzero().flatten().int()
        return self._list


def all_logits(program: Program) -> Tensor | None:
    """Returns the list of all blocks of the vocabulary, int32 ``[1 + ceil(V / VOCAB_BLOCK)]``, as `wanted` of
    `river::linear` has it; None for a program whose head takes no list."""
    head = program.river_head
    if head is None or not head.chooses_logits:
        return None
    count = blocks_of(sum(head.packed[0].out_features))
    with torch.inference_mode(False):  # (whoever compiles in that mode may generate without)
        return torch.tensor([count, *range(count)], dtype=torch.int32)


def blocks_of(vocabulary: int) -> int:
    """Returns how many blocks of logits there are."""
    return -(-vocabulary // VOCAB_BLOCK)
