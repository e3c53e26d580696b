"""A scripted pair of models on one fake cache, for tests of exact mode's loop that need no real model.

The backbone's next token is a fixed function of the ids so far, and the river's is the same but where a second function
says otherwise. The cache remembers which ids stand in which slots and whether the backbone wrote them; every pass
checks that it continues exactly what is cached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_compile.runtime.stats import ExitStats

VOCABULARY = 11


def mix(*numbers: int) -> int:
    """Returns a number that depends on all of these, always the same (FNV-1a)."""
    state = 2166136261
    for number in numbers:
        state = ((state ^ (number & 0xFFFF)) * 16777619) & 0xFFFFFFFF
    return state >> 8


class ScriptedRunner:
    """What the loop needs of a model, scripted.

    Args:
        prompt: ``[B, S]``.
        seed: of both models.
        river_right: in how many of 10 cases the river proposes the backbone's token.
        max_draft: longest draft.
        capacity: slots of the cache.
        memory: how many of the last ids a next token depends on; few make the text repeat itself.
    """

    def __init__(self, prompt: Tensor, seed: int, river_right: int, max_draft: int, capacity: int, memory: int) -> None:
        self.stats = ExitStats()
        self.seed, self.river_right, self.memory = seed, river_right, memory
        self.max_draft, self.capacity = max_draft, capacity
        self.slots: list[tuple[list[int], bool]] = [(prompt[:, i].tolist(), True) for i in range(prompt.shape[1])]
        self.kept = len(self.slots) + 1

    @property
    def longest_draft(self) -> int:
        return max(min(self.max_draft, self.capacity - len(self.slots) - 1), 0)

    def width_for(self, drafted: int) -> int:
        return next(w for w in (1, 2, 4, 8, 16, 32) if w > drafted)

    def logits(self, row: list[int]) -> Tensor:
        """Returns the backbone's logits after one row's ids ``[V]``."""
        recent = row[-self.memory :]
        return torch.tensor([mix(self.seed, token, *recent) % 1000 / 250 for token in range(VOCABULARY)])

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        self._write(ids_BS, 1, exact=False)
        out = []
        for row in ids_BS.tolist():
            logits = self.logits(row)
            out.append(logits if mix(self.seed + 1, *row) % 10 < self.river_right else logits.roll(1))
        return torch.stack(out)

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        self._write(ids_BS, drafted + 1, exact=True)
        first = ids_BS.shape[1] - drafted
        return torch.stack(
            [torch.stack([self.logits(row[:end]) for end in range(first, len(row) + 1)]) for row in ids_BS.tolist()]
        )

    def rewind(self, slots: int) -> None:
        assert 0 <= slots <= len(self.slots)
        del self.slots[len(self.slots) - slots :]

    def keep(self, tokens: int) -> None:
        self.kept += tokens
        self.rewind(len(self.slots) - (self.kept - 1))

    def _write(self, ids_BS: Tensor, width: int, exact: bool) -> None:
        columns = ids_BS.T.tolist()
        start = len(columns) - width
        assert start == len(self.slots), "a pass must start after the last filled slot"
        assert [ids for ids, _ in self.slots] == columns[:start], "the cache holds other ids than the text"
        self.slots += [(ids, exact) for ids in columns[start:]]
        assert len(self.slots) <= self.capacity, "the cache overflows"
