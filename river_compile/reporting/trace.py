"""Traces: the steps and speculation cycles of all models and threads of the process, while a trace is open."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from river_compile.runtime.state import StepState, on_step
from river_compile.runtime.stats import CycleRecord, StepRecord, cycles


@dataclass
class Trace:
    """Steps and cycles recorded while a ``trace()`` was open, in order.

        with river_compile.trace() as trace:
            model.generate(**inputs, max_new_tokens=8)
        print([step.depth for step in trace.tokens], [cycle.accepted for cycle in trace.cycles])

    Attributes:
        steps: every forward pass, prompts included.
        num_blocks: layers of the largest model that ran.
        cycles: those of speculative decoding; their passes are in `steps` too.
    """

    steps: list[StepRecord] = field(default_factory=list)
    num_blocks: int = 0
    cycles: list[CycleRecord] = field(default_factory=list)

    @property
    def tokens(self) -> list[StepRecord]:
        """The decode steps: one per token after a prompt's first."""
        return [step for step in self.steps if step.decode]

    @property
    def mean_depth(self) -> float:
        """Mean exit depth of the decode steps, NaN if there are none."""
        tokens = self.tokens
        return sum(t.depth for t in tokens) / len(tokens) if tokens else float("nan")

    @property
    def kept_sources(self) -> dict[str, int]:
        """Tokens of exact mode by source; a prompt's first token is in no cycle."""
        return dict(Counter(source for cycle in self.cycles for source in cycle.emitted))

    @property
    def acceptance_by_position(self) -> list[float]:
        """Acceptance rate of the first, second ... drafted token."""
        longest = max((len(cycle.drafted) for cycle in self.cycles), default=0)
        reached = [[cycle.accepted > i for cycle in self.cycles if len(cycle.drafted) > i] for i in range(longest)]
        return [sum(kept) / len(kept) for kept in reached]

    def add_step(self, state: StepState, step: StepRecord) -> None:
        """Add a step."""
        self.num_blocks = max(self.num_blocks, state.compiled.program.num_blocks)
        self.steps.append(step)


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Record every step and cycle of the process, in all threads, as a context manager.

        with river_compile.trace() as trace:
            model.generate(**inputs, max_new_tokens=8)
        print(trace.mean_depth, trace.kept_sources, trace.acceptance_by_position)

    Yields:
        The trace, which grows until the context ends.
    """
    found = Trace()
    with on_step(found.add_step), cycles.added(found.cycles.append):
        yield found
