"""KV imputation: the entries of the blocks that a token skipped, by the twins or by a caller's own passes.

``functools.partial(river, fill=...)`` is a backend with another fill; `benchmarks.rivals` has some, for comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from river_compile.exits import Memory
from river_compile.passes.pipeline import Pass
from river_compile.passes.program import RiverProgram, Segment

# Something that runs on a step's slots.
Call = Callable[[list], None]


class Fill:
    """The river's fill, and the interface: asked before the blocks of a step and after its head.

    There is one object for each program. What it remembers of a sequence it keeps in the sequence's memory, under a key
    of its own (:attr:`Memory.entries`).

    Attributes:
        remembers: it keeps an entry in the memory of the sequence.
    """

    remembers: ClassVar[bool] = False

    def __init__(self, program: RiverProgram) -> None:
        self.program = program
        self.num_blocks = program.plan.num_blocks

    @classmethod
    def passes(cls, candidates: tuple[int, ...]) -> list[Pass]:
        """Returns the passes that make the tail after one of `candidates`, in the twins' place."""
        return []

    def blocks(self, blocks: Sequence[Call], steps: Mapping[Segment, Call]) -> list[Call]:
        """Returns the runnable backbone blocks, given their steps and those of all segments."""
        return list(blocks)

    def begin(self, slots: list, memory: Memory) -> int:
        """Prepares a step, nothing of which is written yet; returns how many blocks it may run."""
        return self.num_blocks

    def end(self, slots: list, memory: Memory, depth: int) -> None:
        """Notes a step that left after `depth` blocks."""
