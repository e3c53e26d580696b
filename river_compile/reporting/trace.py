"""Records every step on request.

``with trace() as t:`` records all steps that run anywhere in the process while it is open, so that generation in a
worker thread (as streamers use it) is seen too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from river_compile.runtime.state import StepState, on_step
from river_compile.runtime.stats import CycleRecord, StepRecord, cycles


@dataclass
class Trace:
    """Steps recorded while a ``trace()`` was open, in order."""

    steps: list[StepRecord] = field(default_factory=list)  # every forward pass, prompts included
    num_blocks: int = 0  # of the largest model that ran
    # every cycle of exact mode; its drafts and verifications are among the steps too
    cycles: list[CycleRecord] = field(default_factory=list)

    @property
    def tokens(self) -> list[StepRecord]:
        """The decode steps: one per token after a prompt's first."""
        return [step for step in self.steps if step.decode]

    @property
    def mean_depth(self) -> float:
        """Mean exit depth of the decode steps, NaN where there are none."""
        tokens = self.tokens
        return sum(t.depth for t in tokens) / len(tokens) if tokens else float("nan")

    @property
    def kept_sources(self) -> dict[str, int]:
        """Tokens that exact mode kept, by where they came from (a prompt's first token is in no cycle)."""
        return dict(Counter(source for cycle in self.cycles for source in cycle.kept))

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the first, second ... drafted tokens that exact mode kept."""
        longest = max((len(cycle.drafted) for cycle in self.cycles), default=0)
        reached = [[cycle.accepted > i for cycle in self.cycles if len(cycle.drafted) > i] for i in range(longest)]
        return [sum(kept) / len(kept) for kept in reached]

    def add_step(self, state: StepState, step: StepRecord) -> None:
        """Adds a step that an executor took."""
        self.num_blocks = max(self.num_blocks, state.compiled.program.num_blocks)
        self.steps.append(step)


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Inside, records every step and cycle; see the module's text."""
    found = Trace()
    with on_step(found.add_step), cycles.added(found.cycles.append):
        yield found
