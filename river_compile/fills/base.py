"""What a fill is, and what those that leave holes in the KV cache know of them; see `river_compile.fills.rivals`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, fx

from river_compile.errors import CacheHolesError
from river_compile.passes.fills.entries import kv_entries
from river_compile.passes.fills.over_tokens import per_token
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram
from river_compile.runtime.slots import cache_registers

if TYPE_CHECKING:
    from river_compile.exits import Memory

    from .recompute import Skipped


@dataclass
class Gaps:
    """Which entries one sequence's cache lacks.

    Attributes:
        prompt: tokens before the first one that could leave.
        depths: backbone blocks executed by each token since.
        present: boolean ``[blocks, tokens and more]``, False for an entry that is missing ("mask").
        spans: of each block, the tokens (first, last + 1) that its keys belonged to in the last step.
        views: the parts of `present` about these.
        skipped: tokens that have not run through all blocks, oldest first ("recompute").
    """

    prompt: int
    depths: list[int] = field(default_factory=list)
    present: Tensor | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def after_prompt(self) -> Gaps:
        """Returns the gaps, of which there are none, behind the prompt."""
        return Gaps(self.prompt)

    @property
    def filled(self) -> int:
        """Tokens in the cache."""
        return self.prompt + len(self.depths)


@dataclass(frozen=True)
class Place:
    """Where an executor keeps what a fill looks at.

    Attributes:
        num_blocks: blocks of the model.
        decode: whether the graph is a decode step's.
        hidden: registers of the hidden states ``[B, T, D]``: before the first block, and behind each.
        state: register of the sequence's :class:`Gaps`, behind all values.
        length: register of a static cache's counter of filled slots, None where none counts them.
        presence: registers of the blocks' presence inputs.
        keys: of each block, the register of its KV cache before the step.
        grows: whether the cache grows by the step's token.
        per_token: registers of what blocks read about a token, its hidden state left out, in the order in which they
            read it (which all graphs of a model share; the numbers differ from graph to graph).
    """

    num_blocks: int
    decode: bool
    hidden: tuple[int, ...]
    state: int
    length: int | None
    presence: tuple[int, ...] = ()
    keys: tuple[int | None, ...] = ()
    grows: bool = False
    per_token: tuple[int, ...] = ()


class Fill:
    """The river's, and the interface: asked before the blocks of a step and after its head.

    Attributes:
        name: how the option ``fill=`` calls it.
        remembers: it keeps :class:`Gaps` in the memory of the sequence.
    """

    name: ClassVar[str] = "river"
    remembers: ClassVar[bool] = False

    def passes(self, candidates: tuple[int, ...]) -> list[Pass]:
        """Returns the passes that make, in the twins' place, what a token that left runs."""
        return []

    def begin(self, registers: list, memory: Memory, place: Place) -> int:
        """Prepares a step, nothing of which is written yet; returns how many blocks it may run."""
        return place.num_blocks

    def blocks(self, blocks: Sequence, catch_up: Sequence, place: Place) -> list:
        """Returns what runs as the backbone's blocks, given their steps and those for several tokens at once."""
        return list(blocks)

    def end(self, registers: list, memory: Memory, place: Place, depth: int) -> None:
        """Notes a step that left after `depth` blocks."""


class Holes(Fill):
    """Skipped blocks take a slot and leave it empty."""

    remembers = True

    def passes(self, candidates: tuple[int, ...]) -> list[Pass]:
        return [kv_entries(empty=True)]

    def begin(self, registers: list, memory: Memory, place: Place) -> int:
        length = None if place.length is None else int(registers[place.length])
        if place.decode:
            if memory.gaps is None or length not in (None, memory.gaps.filled):
                raise CacheHolesError(
                    f"fill={self.name!r} must see every token of a KV cache, and this one was filled or changed "
                    "elsewhere (beam search does so); use fill='river' or fill='propagate', which leave no holes"
                )
            return self.limit(memory.gaps, place.num_blocks)
        empty = length == 0 or (length is None and memory.gaps is None)
        if not empty and (memory.gaps is None or any(d < place.num_blocks for d in memory.gaps.depths)):
            raise CacheHolesError(
                f"fill={self.name!r} takes one prompt for each KV cache, and this one has entries that tokens skipped; "
                "start a new cache, or use fill='river' or fill='propagate', which leave no holes"
            )
        before = 0 if empty else memory.gaps.filled
        memory.gaps = Gaps(before + registers[place.hidden[0]].shape[1])
        return place.num_blocks

    def end(self, registers: list, memory: Memory, place: Place, depth: int) -> None:
        if place.decode:
            memory.gaps.depths.append(depth)

    def limit(self, gaps: Gaps, num_blocks: int) -> int:
        """Returns how many blocks the next token may run."""
        return num_blocks


def place_of(program: RiverProgram, register: dict[fx.Node, int]) -> Place:
    """Returns where an executor with these registers keeps what a fill looks at."""
    plan = program.plan
    pairs = list(zip(program.catch_up, plan.blocks, strict=False))  # (there are none, or one for each block)
    lengths = [block.kv.lengths[0] for block in plan.blocks if block.kv.lengths]
    return Place(
        plan.num_blocks,
        plan.is_decode,
        tuple(register[n] for n in (plan.blocks[0].hidden_in, *(block.hidden_out for block in plan.blocks))),
        len(register),
        register[lengths[0]] if lengths else None,
        tuple(register[node] for node in program.presence),
        tuple(cache_registers(plan, register, block)[0] for block in range(plan.num_blocks)),
        plan.blocks[0].kv.kind == "dynamic",
        tuple(dict.fromkeys(register[n] for pair in pairs for n in per_token(*pair) if n is not pair[1].hidden_in)),
    )
