"""The fill that masks missing KV entries out of attention (D-LLM)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.rivals.entries import presence_masks
from benchmarks.rivals.holes import Gaps, Holes
from river_compile.exits import Memory
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram
from river_compile.runtime.slots import cache_slots


@dataclass
class Presence:
    """Which entries of one sequence are there.

    Attributes:
        present: boolean ``[blocks, tokens and more]``, False for an entry that is missing.
        spans: of each block, the tokens (first, last + 1) that its keys belonged to in the last step.
        views: the parts of `present` about these.
    """

    present: Tensor | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)


class Mask(Holes):
    """Missing entries are masked out of attention, block by block."""

    name = "mask"

    @classmethod
    def passes(cls, candidates: tuple[int, ...]) -> list[Pass]:
        return [*super().passes(candidates), presence_masks]

    def __init__(self, program: RiverProgram) -> None:
        super().__init__(program)
        self._presence = [program.slots[node] for node in program.added_inputs]
        keys = [cache_slots(program, block)[0] for block in range(self.num_blocks)]
        self._keys = [slot for slot in keys if slot is not None]  # (a static or dynamic cache always has one)
        self._grows = program.plan.cache == "dynamic"  # by the step's token

    def begin(self, slots: list, memory: Memory) -> int:
        limit = super().begin(slots, memory)
        if self._presence and self.program.plan.is_decode:
            self._show(slots, memory)
        return limit

    def end(self, slots: list, memory: Memory, depth: int) -> None:
        if depth < self.num_blocks:
            memory.entries[Presence].present[depth:, memory.entries[Gaps].filled] = False
        super().end(slots, memory, depth)

    def _show(self, slots: list, memory: Memory) -> None:
        """Puts the part of `present` that each block's attention reads into the block's slot.

        The keys of a block are the last tokens in order, then (in a static cache) entries not filled yet: so the first
        one belongs to token ``filled - keys``, or to token 0 where there are fewer tokens than keys.
        """
        seen: Presence = memory.entries.setdefault(Presence, Presence())
        filled = memory.entries[Gaps].filled + 1  # this token's entry is written before it is read
        lengths = [slots[keys].shape[2] + self._grows for keys in self._keys]
        spans = [(first := max(0, filled - length), first + length) for length in lengths]
        if spans != seen.spans:
            present = self._grown(seen.present, max(last for _, last in spans), slots[self.hidden[0]].device)
            seen.views = [present[block, first:last] for block, (first, last) in enumerate(spans)]
            seen.spans, seen.present = spans, present
        for slot, view in zip(self._presence, seen.views, strict=True):
            slots[slot] = view

    def _grown(self, before: Tensor | None, tokens: int, device: torch.device) -> Tensor:
        """Returns `present` with room for at least so many tokens."""
        if before is not None and before.shape[1] >= tokens:
            return before
        with torch.inference_mode(False):  # (so that any mode may write to it)
            more = torch.ones(self.num_blocks, 2 * tokens, dtype=torch.bool, device=device)
            return more if before is None else torch.cat([before, more], dim=1)
