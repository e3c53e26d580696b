"""A scripted pair of models on one fake cache, for tests of exact mode's loop that need no real model.

The backbone's next token is a fixed function of the ids so far, and the twins' is the same but where a second function
says otherwise. The cache remembers which ids of each row stand in which slots and whether the backbone wrote them;
every pass checks that it continues exactly what is cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        river_right: in how many of 10 cases the twins propose the backbone's token.
        max_draft: longest draft.
        capacity: slots of the cache.
        memory: how many of the last ids a next token depends on; few make the text repeat itself.

    Attributes:
        slots: for each row what stands in the filled slots, an id and whether the backbone wrote it; None for filler.
        rows: which rows of the call are in the batch.
        ended: rows whose slots are not looked at any more; the test's loop sets it.
        shrinks: whether the last row of a batch may continue alone.
        runs_late: whether passes are taken to return before they have run.
    """

    runs_late, widths, padding = False, (1, 2, 4, 8, 16, 32), 0

    def __init__(self, prompt: Tensor, seed: int, river_right: int, max_draft: int, capacity: int, memory: int) -> None:
        self.stats = ExitStats()
        self.seed, self.river_right, self.memory = seed, river_right, memory
        self.max_draft, self.capacity = max_draft, capacity
        self.slots: list[list[tuple[int, bool] | None]] = [[(token, True) for token in row] for row in prompt.tolist()]
        self.rows = list(range(len(prompt)))
        self.shrinks = True
        self._filler = 0
        self.ended: Callable[[], list[bool]] = lambda: [False] * len(prompt)

    @property
    def filled(self) -> int:
        return len(self.slots[0])

    @property
    def longest_draft(self) -> int:
        return max(min(self.max_draft, self.capacity - self.filled - 1), 0)

    def width_for(self, drafted: int) -> int:
        return next(w for w in self.widths if w > drafted)

    def logits(self, row: list[int]) -> Tensor:
        """Returns the backbone's logits after one row's ids ``[V]``."""
        recent = row[-self.memory :]
        return torch.tensor([mix(self.seed, token, *recent) % 1000 / 250 for token in range(VOCABULARY)])

    def step(self, ids_BS: Tensor) -> Tensor:
        return self.verify(ids_BS, 0)

    def begin_drafts(self, ids_1S: Tensor) -> None:
        assert len(self.slots) == len(ids_1S) == 1

    def can_draft(self) -> bool:
        return True

    def draft_step(self, ids_BS: Tensor) -> Tensor:
        self._write(ids_BS, 1, exact=False)
        out = []
        for row in ids_BS.tolist():
            logits = self.logits(row)
            out.append(logits if mix(self.seed + 1, *row[-self.memory :]) % 10 < self.river_right else logits.roll(1))
        return torch.stack(out)

    def verify(self, ids_BS: Tensor, drafted: int) -> Tensor:
        self._write(ids_BS, drafted + 1, exact=True)
        self._filler = self.width_for(drafted) - drafted - 1  # (which a pass does not write here)
        first = ids_BS.shape[1] - drafted
        return torch.stack(
            [torch.stack([self.logits(row[:end]) for end in range(first, len(row) + 1)]) for row in ids_BS.tolist()]
        )

    def rewind(self, slots: int) -> None:
        slots, self._filler = slots - self._filler, 0
        assert 0 <= slots <= self.filled
        for row in self.slots:
            del row[len(row) - slots :]

    def should_shrink(self, tokens_left: int) -> bool:
        return self.shrinks

    def make_room(self, tokens):
        """The cache stays as long as it is."""

    def select(self, rows: Sequence[int]) -> None:
        self.slots = [self.slots[row] for row in rows]
        self.rows = [self.rows[row] for row in rows]
        assert not any(self.ended()[row] for row in self.rows), "a row that has ended goes on"

    def _write(self, ids_BS: Tensor, width: int, exact: bool) -> None:
        start = ids_BS.shape[1] - width
        assert start == self.filled, "a pass must start after the last filled slot"
        ended = self.ended()
        for number, row, ids in zip(self.rows, self.slots, ids_BS.tolist(), strict=True):
            cached = [(slot[0], token) for slot, token in zip(row, ids, strict=False) if slot is not None]
            assert ended[number] or all(slot == token for slot, token in cached), (
                "the cache holds other ids than the text"
            )
            row += [(token, exact) for token in ids[start:]]
        assert self.filled <= self.capacity, "the cache overflows"
