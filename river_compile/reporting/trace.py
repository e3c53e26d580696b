"""Records every step on request.

``with trace() as t:`` records all steps that run anywhere in the process while it is open, so that generation in a
worker thread (as streamers use it) is seen too.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from river_compile.reporting.plots import plot_cycles, plot_depths
from river_compile.runtime.executor import RiverExecutor, on_step
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
        rows = [row for cycle in self.cycles for row in cycle.rows]
        longest = max((len(row.drafted) for row in rows), default=0)
        reached = [[row.accepted > i for row in rows if len(row.drafted) > i] for i in range(longest)]
        return [sum(kept) / len(kept) for kept in reached]

    def plot(self, path: str | Path, texts: list[str] | None = None) -> Path:
        """Draws the tokens above their texts as a PNG; returns the path.

        Bars are exit depths. Where cycles of exact mode were recorded, they are the tokens' places in their cycles,
        coloured by where the tokens came from.

        Args:
            path: the file to write.
            texts: the decoded text of each token but a prompt's first: one for each of :attr:`tokens`, in exact mode
                for each token that the cycles kept of the batch's first row, which alone is drawn. Numbers stand in
                where it is None.

        Raises:
            ValueError: nothing was recorded, or `texts` has another length.
        """
        if self.cycles:
            first = [row for cycle in self.cycles for row in cycle.rows if row.row == 0]
            return plot_cycles(path, texts, first)
        return plot_depths(path, texts, self.tokens, self.num_blocks)

    def add_step(self, executor: RiverExecutor, args: Sequence[object], step: StepRecord) -> None:
        """Adds a step that an executor took."""
        self.num_blocks = max(self.num_blocks, executor.num_blocks)
        self.steps.append(step)


@contextlib.contextmanager
def trace() -> Iterator[Trace]:
    """Inside, records every step and cycle; see the module's text."""
    found = Trace()
    with on_step(found.add_step), cycles.added(found.cycles.append):
        yield found
