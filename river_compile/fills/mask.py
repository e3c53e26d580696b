"""The fill that masks missing KV entries out of attention (D-LLM)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from river_compile.passes.fills.entries import presence_masks
from river_compile.passes.pipeline import Pass

from .base import Gaps, Holes, Place

if TYPE_CHECKING:
    from river_compile.exits import Memory


class Mask(Holes):
    """Missing entries are masked out of attention, block by block."""

    name = "mask"

    def passes(self, candidates: tuple[int, ...]) -> list[Pass]:
        return [*super().passes(candidates), presence_masks]

    def begin(self, registers: list, memory: Memory, place: Place) -> int:
        limit = super().begin(registers, memory, place)
        if place.decode and place.presence:
            self._show(registers, memory.gaps, place)
        return limit

    def end(self, registers: list, memory: Memory, place: Place, depth: int) -> None:
        if depth < place.num_blocks:
            memory.gaps.present[depth:, memory.gaps.filled] = False
        super().end(registers, memory, place, depth)

    def _show(self, registers: list, gaps: Gaps, place: Place) -> None:
        """Puts the part of `present` that each block's attention reads into the block's register.

        The keys of a block are the last tokens in order, then (in a static cache) slots not filled yet: so the first
        one belongs to token ``filled - keys``, or to token 0 where there are fewer tokens than keys.
        """
        filled = gaps.filled + 1  # this token's entry is written before it is read
        lengths = [registers[keys].shape[2] + place.grows for keys in place.keys]
        spans = [(first := max(0, filled - length), first + length) for length in lengths]
        if spans == gaps.spans:
            views = gaps.views
        else:
            _grow(gaps, max(last for _, last in spans), place.num_blocks, registers[place.hidden[0]].device)
            views = [gaps.present[block, first:last] for block, (first, last) in enumerate(spans)]
            gaps.spans, gaps.views = spans, views
        for register, view in zip(place.presence, views, strict=True):
            registers[register] = view


def _grow(gaps: Gaps, tokens: int, num_blocks: int, device: torch.device) -> None:
    """Makes `present` hold at least so many tokens."""
    before = gaps.present
    if before is not None and before.shape[1] >= tokens:
        return
    with torch.inference_mode(False):  # (so that any mode may write to it)
        gaps.present = torch.ones(num_blocks, 2 * tokens, dtype=torch.bool, device=device)
        if before is not None:
            gaps.present[:, : before.shape[1]] = before
