"""What fills that leave holes in the KV cache know of them, and which caches they refuse."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.rivals.entries import kv_entries
from river_compile.exits import Memory
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram
from river_compile.runtime.fill import Fill


class CacheHolesError(ValueError):
    """A fill that leaves holes in the KV cache cannot account for this one; nothing was written."""


@dataclass
class Gaps:
    """Which entries one sequence's cache lacks.

    Attributes:
        prompt: tokens before the first one that could leave.
        depths: backbone blocks executed by each token since.
    """

    prompt: int
    depths: list[int] = field(default_factory=list)

    @property
    def filled(self) -> int:
        """Tokens in the cache."""
        return self.prompt + len(self.depths)


class Holes(Fill):
    """Skipped blocks take a slot and leave it empty. The memory of a sequence holds its :class:`Gaps`.

    Attributes:
        hidden: slots of the hidden states ``[B, T, D]``: before the first block, and after each.
    """

    remembers = True

    @classmethod
    def passes(cls, candidates: tuple[int, ...]) -> list[Pass]:
        return [kv_entries(empty=True)]

    def __init__(self, program: RiverProgram) -> None:
        super().__init__(program)
        plan = program.plan
        states = (plan.blocks[0].hidden_in, *(block.hidden_out for block in plan.blocks))
        self.hidden = [program.slots[node] for node in states]
        lengths = [block.kv.lengths[0] for block in plan.blocks if block.kv.lengths]
        self._length = program.slots[lengths[0]] if lengths else None  # counts a static cache's tokens

    def begin(self, slots: list, memory: Memory) -> int:
        length = None if self._length is None else int(slots[self._length])
        gaps: Gaps | None = memory.entries.get(Gaps)
        if self.program.plan.is_decode:
            if gaps is None or length not in (None, gaps.filled):
                raise CacheHolesError(
                    f"the fill {self.name!r} must see every token of a KV cache, and this one was filled or changed "
                    "elsewhere (beam search does so); 'propagate' leaves no holes"
                )
            return self.limit(gaps)
        empty = length == 0 or (length is None and gaps is None)
        if not empty and (gaps is None or any(depth < self.num_blocks for depth in gaps.depths)):
            raise CacheHolesError(
                f"the fill {self.name!r} takes one prompt for each KV cache, and this one has entries that tokens "
                "skipped; start a new cache"
            )
        before = gaps.filled if gaps is not None and not empty else 0
        memory.entries.clear()
        memory.entries[Gaps] = Gaps(before + slots[self.hidden[0]].shape[1])
        return self.num_blocks

    def end(self, slots: list, memory: Memory, depth: int) -> None:
        if self.program.plan.is_decode:
            memory.entries[Gaps].depths.append(depth)

    def limit(self, gaps: Gaps) -> int:
        """Returns how many blocks the next token may run."""
        return self.num_blocks
