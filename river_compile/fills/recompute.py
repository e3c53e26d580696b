"""The fill that runs skipped blocks later, when a token needs their entries (EE-LLM).

A token that runs block l reads the entries of all tokens before it. So those of them that left before l run l with it,
as one batch: they are the last tokens before it, because whoever ran l before took its predecessors along. Each
continues from the hidden state with which it left, which stays at hand until the token has run through all blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from river_compile.passes.fills.over_tokens import catch_up
from river_compile.passes.pipeline import Pass

from .base import Holes, Place

if TYPE_CHECKING:
    from river_compile.exits import Memory
    from river_compile.runtime.executor import Step


@dataclass
class Skipped:
    """A token that left early.

    Attributes:
        depth: blocks that it ran so far.
        hidden: its hidden state behind them, ``[B, 1, D]``.
        inputs: what else blocks read about it (cosines, sines, mask), in the order of ``Place.per_token``.
    """

    depth: int
    hidden: Tensor
    inputs: tuple[Tensor, ...]


@dataclass
class Batch:
    """The tokens that run together in one step, the newest, whose step it is, last.

    Attributes:
        skipped: the others.
        hidden: the hidden states ``[tokens, B, 1, D]`` of all.
        inputs: what else blocks read about them, stacked in the same way.
    """

    skipped: list[Skipped]
    hidden: Tensor
    inputs: tuple[Tensor, ...]


@dataclass
class Turn:
    """What a step's blocks share: the sequence's skipped tokens, and those that run with it by now."""

    skipped: list[Skipped]
    batch: Batch | None = None


class Recompute(Holes):
    """Skipped blocks run later, for all tokens that are missing there."""

    name = "recompute"

    def passes(self, candidates: tuple[int, ...]) -> list[Pass]:
        return [*super().passes(candidates), catch_up(candidates)]

    def begin(self, registers: list, memory: Memory, place: Place) -> int:
        limit = super().begin(registers, memory, place)
        registers[place.state] = Turn(memory.gaps.skipped)
        return limit

    def blocks(self, blocks: Sequence, catch_up: Sequence, place: Place) -> list:
        if not catch_up:
            return list(blocks)
        pairs = enumerate(zip(blocks, catch_up, strict=True), start=1)
        return [CatchUpBlock(one, several, depth, place) for depth, (one, several) in pairs]

    def end(self, registers: list, memory: Memory, place: Place, depth: int) -> None:
        super().end(registers, memory, place, depth)
        gaps, batch = memory.gaps, registers[place.state].batch
        if batch is not None:
            for token, hidden in zip(batch.skipped, batch.hidden, strict=False):  # (the newest is the last one)
                token.hidden = hidden
            gaps.skipped = [token for token in gaps.skipped if token.depth < place.num_blocks]
        if depth < place.num_blocks:
            inputs = tuple(registers[register].clone() for register in place.per_token)
            gaps.skipped.append(Skipped(depth, registers[place.hidden[depth]], inputs))


class CatchUpBlock:
    """A backbone block that takes along the tokens that skipped it.

    Args:
        one: the block's step for one token.
        several: its step for several.
        depth: the block's number, from 1.
        place: where the registers are.
    """

    def __init__(self, one: Step, several: Step, depth: int, place: Place) -> None:
        self.name = one.name
        self._one, self._several, self._depth, self._place = one, several, depth, place

    def __call__(self, registers: list) -> Sequence:
        turn = registers[self._place.state]
        behind = [token for token in turn.skipped if token.depth < self._depth]
        if not behind:
            return self._one(registers)
        before, after = self._place.hidden[self._depth - 1 : self._depth + 1]
        batch = turn.batch = self._join(turn.batch, behind, registers, registers[before])
        several = registers.copy()
        several[before] = batch.hidden
        for register, stack in zip(self._place.per_token, batch.inputs, strict=True):
            several[register] = stack
        outputs = self._several(several)
        batch.hidden = several[after]
        for token in behind:
            token.depth = self._depth
        registers[after] = batch.hidden[-1]
        return outputs

    def _join(self, batch: Batch | None, behind: list[Skipped], registers: list, newest: Tensor) -> Batch:
        """Returns the batch with the tokens that are behind now: those that join it are older than those in it."""
        joining = behind[: len(behind) - (len(batch.skipped) if batch else 0)]
        if not joining:
            return batch
        hidden = torch.cat([torch.stack([t.hidden for t in joining]), batch.hidden if batch else newest[None]])
        columns = zip(*(t.inputs for t in behind), [registers[r] for r in self._place.per_token], strict=True)
        inputs = tuple(torch.stack(column) for column in columns)
        return Batch(behind, hidden, inputs)
