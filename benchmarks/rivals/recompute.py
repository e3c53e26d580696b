"""The fill that runs skipped blocks later, when a token needs their entries (EE-LLM).

A token that runs block l reads the entries of all tokens before it. So those of them that left before l run l with it,
as one batch: they are the last tokens before it, because whoever ran l before took its predecessors along. Each
continues from the hidden state with which it left, which stays at hand until the token has run through all blocks.

Not handled: threads that decode with one model at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.rivals.holes import Holes
from benchmarks.rivals.over_tokens import catch_up, per_token
from river_compile.exits import Memory
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram, Segment
from river_compile.runtime.fill import Call
from river_compile.runtime.slots import SCORE


@dataclass
class Skipped:
    """A token that left early.

    Attributes:
        depth: blocks that it ran so far.
        hidden: its hidden state after them, ``[B, 1, D]``.
        inputs: what else blocks read about it (cosines, sines, mask), in the order of `Recompute.per_token`.
    """

    depth: int
    hidden: Tensor
    inputs: tuple[Tensor, ...]


@dataclass
class Batch:
    """The tokens that run together in one step: those that `skipped` blocks, then the one whose step it is.

    `hidden` has their hidden states ``[tokens, B, 1, D]``; `inputs`, what else blocks read, is stacked in the same way.
    """

    skipped: list[Skipped]
    hidden: Tensor
    inputs: tuple[Tensor, ...]


@dataclass
class Left:
    """The tokens of one sequence that have not run through all blocks, oldest first, and the batch of this step."""

    tokens: list[Skipped] = field(default_factory=list)
    batch: Batch | None = None


class Recompute(Holes):
    """Skipped blocks run later, for all tokens that are missing there.

    Attributes:
        per_token: slots of what blocks read about a token, its hidden state left out, in the order in which they read
            it (which all graphs of a model share; the numbers differ from graph to graph).
        left: of the sequence whose step runs.
    """

    name = "recompute"

    @classmethod
    def passes(cls, candidates: tuple[int, ...]) -> list[Pass]:
        return [*super().passes(candidates), catch_up(candidates)]

    def __init__(self, program: RiverProgram) -> None:
        super().__init__(program)
        self.left = Left()
        pairs = zip(program.extra, program.plan.blocks, strict=False)  # (there are none, or one for each block)
        read = [node for several, block in pairs for node in per_token(several, block) if node is not block.hidden_in]
        self.per_token = [program.slots[node] for node in dict.fromkeys(read)]

    def blocks(self, blocks: Sequence[Call], steps: Mapping[Segment, Call]) -> list[Call]:
        several = [steps[segment] for segment in self.program.extra if segment in steps]
        if not several:
            return list(blocks)
        pairs = zip(blocks, several, strict=True)
        return [CatchUpBlock(self, one, more, depth) for depth, (one, more) in enumerate(pairs, start=1)]

    def begin(self, slots: list, memory: Memory) -> int:
        limit = super().begin(slots, memory)
        self.left = left = memory.entries.setdefault(Left, Left())
        left.batch = None
        return limit

    def end(self, slots: list, memory: Memory, depth: int) -> None:
        super().end(slots, memory, depth)
        left = self.left
        if left.batch is not None:
            pairs = zip(left.batch.skipped, left.batch.hidden, strict=False)  # (the newest is the last one)
            for token, hidden in pairs:
                token.hidden = hidden
            left.tokens = [token for token in left.tokens if token.depth < self.num_blocks]
        if depth < self.num_blocks:
            inputs = tuple(slots[slot].clone() for slot in self.per_token)
            left.tokens.append(Skipped(depth, slots[self.hidden[depth]], inputs))


class CatchUpBlock:
    """Backbone block number `depth`, from 1, that takes along the tokens that skipped it.

    `one` is its step for one token, `several` that for several.
    """

    def __init__(self, fill: Recompute, one: Call, several: Call, depth: int) -> None:
        self._fill, self._one, self._several, self._depth = fill, one, several, depth
        self._before, self._after = fill.hidden[depth - 1 : depth + 1]
        self._per_token = fill.per_token

    def __call__(self, slots: list) -> None:
        left = self._fill.left
        missing = [token for token in left.tokens if token.depth < self._depth]
        if not missing:
            self._one(slots)
            return
        batch = left.batch = self._join(left.batch, missing, slots)
        several = slots.copy()
        several[self._before] = batch.hidden
        for slot, stack in zip(self._per_token, batch.inputs, strict=True):
            several[slot] = stack
        self._several(several)
        batch.hidden = several[self._after]
        for token in missing:
            token.depth = self._depth
        slots[self._after], slots[SCORE] = batch.hidden[-1], several[SCORE]

    def _join(self, batch: Batch | None, missing: list[Skipped], slots: list) -> Batch:
        """Returns the batch of all tokens that miss the block: those that join it are older than those in it."""
        joining = missing[: len(missing) - (len(batch.skipped) if batch else 0)]
        if batch is not None and not joining:
            return batch
        newest = batch.hidden if batch is not None else slots[self._before][None]
        hidden = torch.cat([torch.stack([t.hidden for t in joining]), newest])
        columns = zip(*(t.inputs for t in missing), [slots[slot] for slot in self._per_token], strict=True)
        return Batch(missing, hidden, tuple(torch.stack(column) for column in columns))
