"""Runs spans of a program's segments on a step's slots. The executor decides which spans; a runner knows how.

Two kinds exist: :class:`PlainRunner` calls compiled code segment by segment, and
:class:`river_compile.capture.runner.CapturedRunner` launches graphs of many segments. A runner makes no rules: it
knows no thresholds, and keeps no memory of a sequence.
"""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from torch import Tensor, fx

from river_compile.passes.program import RiverProgram, Segment
from river_compile.runtime.slots import SCORE, LastToken, Slots, gather, new_slots

# What a compiled segment is: a function of a list (which it may empty) that returns a sequence.
Callee = Callable[[list], Sequence]


class Step:
    """A segment bound to its slots and to the tensors of its 4-bit matmuls, `packed`.

    Attributes:
        moves: whether it may compute with weights at another address in every run.
    """

    __slots__ = ("_callee", "_outputs", "_take", "packed", "segment")
    moves = False

    def __init__(
        self, segment: Segment, callee: Callee, packed: Sequence[Tensor], slots: Mapping[fx.Node, int]
    ) -> None:
        self.segment = segment
        self.packed = list(packed)
        self._callee = callee
        self._take = gather([slots[node] for node in segment.inputs])
        self._outputs = [slots[node] for node in segment.outputs] + [SCORE] * segment.has_score

    @property
    def callee(self) -> Callee:
        """The compiled segment."""
        return self._callee

    def __call__(self, slots: list) -> None:
        """Runs the segment: reads its inputs from the slots and puts its outputs there, its score in `SCORE`."""
        self.run_as(self._callee, slots)

    def run_as(self, callee: Callee, slots: list) -> None:
        """Runs another callee in the place of the compiled segment."""
        outputs = callee([*self._take(slots), *self.packed])
        for index, value in zip(self._outputs, outputs, strict=True):
            slots[index] = value


class Runner(ABC):
    """Runs one program. A step is :meth:`begin`, then blocks and scores in order, perhaps a tail, then :meth:`finish`.

    It is entered (``with runner:``) for the length of a step. L is the number of blocks; the head runs with block L,
    and with the tail of a token that left before. `steps` has the compiled step of each segment that can be reached.

    Attributes:
        binds: whether a step on an earlier one's slots is any faster.
    """

    binds = False

    def __init__(self, program: RiverProgram, steps: Mapping[Segment, Step]) -> None:
        self.steps, self._program = steps, program

    def for_pass(self, args: Sequence) -> Runner:
        """Returns the runner of the pass with these inputs of the graph: itself, or a better suited one."""
        return self

    def for_last_token(self) -> Runner:
        """Returns a runner of the same passes whose logits may be those of the last token alone."""
        return self

    @abstractmethod
    def __enter__(self) -> None:
        """Begins a step, before anything runs."""

    @abstractmethod
    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        """Ends a step that ran, or failed."""

    @abstractmethod
    def begin(self, args: Sequence, slots: Slots | None = None) -> Slots:
        """Returns the step's slots, given the graph's inputs, and runs the prologue.

        Nothing of the caller's has been written when this returns.

        Args:
            args: the inputs.
            slots: of an earlier step, to be used again. Its parameters and its cache lay where these do, and its other
                tensors had these shapes.
        """

    @abstractmethod
    def blocks(self, slots: list, start: int, end: int) -> None:
        """Runs blocks start+1..end, whatever their checks say, and the head where `end` is L."""

    def through(self, slots: list, depth: int) -> None:
        """Runs everything between :meth:`begin` and :meth:`finish` of a token that leaves after `depth` blocks."""
        self.blocks(slots, 0, depth)
        if depth < self._program.plan.num_blocks:
            self.tail(slots, depth)

    @abstractmethod
    def read_score(self, slots: list, depth: int) -> float:
        """Returns the exit score after block `depth`, which ran last, and waits for it."""

    @abstractmethod
    def tail(self, slots: list, depth: int) -> None:
        """Runs the tail after `depth` blocks: the twins of the others and the head."""

    @abstractmethod
    def head_score(self, slots: list) -> Tensor:
        """Returns the score of the head that ran last as a scalar tensor, which no later step overwrites."""

    @abstractmethod
    def finish(self, slots: list) -> tuple:
        """Returns the graph's outputs, which no later step overwrites."""


class PlainRunner(Runner):
    """Calls the steps, one after the other. Holds nothing of a step, so threads may use it at the same time."""

    def __init__(self, program: RiverProgram, steps: Mapping[Segment, Step]) -> None:
        super().__init__(program, steps)
        self._num_blocks = program.plan.num_blocks
        self._return = gather([program.slots[node] for node in program.returned])
        self.prologue = steps[program.prologue]
        self._blocks = [steps.get(block, _missing) for block in program.blocks]
        self._twins = [steps.get(twin, _missing) for twin in program.twins]
        self._head: Callable[[list], None] = steps.get(program.head, _missing)
        self._river_head: Callable[[list], None] = steps.get(program.river_head or program.head, _missing)

    def for_last_token(self) -> Runner:
        return self._of_last_token

    @functools.cached_property
    def _of_last_token(self) -> Runner:
        last = LastToken.of(self._program)
        if last is None:
            return self
        other = copy.copy(self)

        def after(head: Callable[[list], None]) -> Callable[[list], None]:
            def run(slots: list) -> None:
                with last.alone(slots):
                    head(slots)

            return run

        other._head, other._river_head = after(self._head), after(self._river_head)
        return other

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        pass

    def begin(self, args: Sequence, slots: Slots | None = None) -> Slots:
        slots = new_slots(self._program, args)
        self.prologue(slots)
        return slots

    def blocks(self, slots: list, start: int, end: int) -> None:
        for block in self._blocks[start:end]:
            block(slots)
        if end == self._num_blocks:
            self._head(slots)

    def tail(self, slots: list, depth: int) -> None:
        for twin in self._twins[depth:]:
            twin(slots)
        self._river_head(slots)

    def read_score(self, slots: list, depth: int) -> float:
        return slots[SCORE].item()

    def head_score(self, slots: list) -> Tensor:
        return slots[SCORE]

    def finish(self, slots: list) -> tuple:
        return tuple(self._return(slots))


def _missing(slots: list) -> None:
    raise AssertionError("a token took a way that its exit policy does not allow")
