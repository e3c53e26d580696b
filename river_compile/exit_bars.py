"""Exit rules as numbers that a device compares with, so that a step needs no host to decide.

A rule has one *bar* for each depth from 0 to L, the number of blocks. A token leaves after d < L blocks where its score
is above ``bars[d]``: no score is above `NEVER`, and at `ALWAYS` a token leaves whatever its score, NaN included. Before
the first block, and for "confidence", the score is a number that is known before the step. ``bars[L]`` belongs to
"doubt": the backbone answers anew unless the entropy of the river's logits is below it; at `ALWAYS` the river is
believed.

Not handled (the host decides): criteria that are not named here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from river_compile.exits import Confidence, Criterion, Doubt, ExitPolicy, Memory, Similarity, threshold_after
from river_compile.passes.program import DecoderPlan, RiverProgram

NEVER = math.inf
ALWAYS = math.nan  # (one object: tuples of bars are found again by it)

# What a score is compared with, by a criterion's threshold. (A subclass may decide otherwise.)
_BARS: dict[type[Criterion], Callable[[float], float]] = {
    Similarity: lambda threshold: threshold,
    Confidence: lambda threshold: -threshold,  # the score is the negative entropy
}


class Taken(NamedTuple):
    """The way that a step took.

    Attributes:
        depth: backbone blocks executed before it left; all of them for a doubted step.
        scores: those that were asked for after blocks.
        entropy: of the logits that decided, None where none did.
        river_from: backbone blocks before the river's part of a doubted step, None for other steps.
    """

    depth: int
    scores: tuple[float, ...] = ()
    entropy: float | None = None
    river_from: int | None = None


class ExitBars(NamedTuple):
    """When the token of one step leaves.

    Attributes:
        bars: by depth; see the module's text.
        asked: depths with a score that is asked for.
        first: the depth at which the token leaves, if it does, where no block is asked; None where blocks are.
        doubts: whether the river may not be believed.
        given: the score that is known before the step, a float32 scalar on the device; None: NaN.
    """

    bars: tuple[float, ...]
    asked: tuple[int, ...] = ()
    first: int | None = None
    doubts: bool = False
    given: Tensor | None = None

    def taken(self, outcome: Sequence[float]) -> Taken:
        """Returns the way that a step took, given the scores at each depth, the head's entropy, and the depth."""
        *scores, entropy, end = outcome
        depth, last = int(end), len(scores)
        if self.doubts:
            return Taken(depth, (), entropy, self.first if depth == last else None)
        if self.first is not None:
            return Taken(depth, (), None if self.given is None else -scores[self.first])
        return Taken(depth, tuple(scores[d] for d in self.asked if d <= depth))


def rule_of(policy: ExitPolicy, program: RiverProgram, memory: Memory) -> ExitBars | None:
    """Returns a policy's rule for one step of a program, None where only the host can decide."""
    rule = _rule(policy, program.candidates, program.plan.num_blocks)
    if rule is not None and rule.first is not None and memory.entropy is not None:
        return rule._replace(given=-memory.entropy)
    return rule


def why_host_decides(policy: ExitPolicy, plan: DecoderPlan) -> str | None:
    """Returns why a policy has no rule, None where it has one."""
    if _rule(policy, policy.candidates(plan), plan.num_blocks) is not None:
        return None
    return f"criterion={policy.criterion.name!r} with first_exit={policy.first_exit} is more than one comparison"


def forks(policy: ExitPolicy, plan: DecoderPlan) -> tuple[int, ...]:
    """Returns the depths at which the tokens of a graph may part: 0, where a depth can be forced, and each check."""
    if policy.fixed_depth is not None:
        return ()
    checks = policy.candidates(plan) if policy.criterion.scores_blocks else (policy.first_exit,)
    return tuple(depth for depth in sorted({0, *checks}) if depth < policy.last(plan.num_blocks))


@functools.lru_cache(maxsize=256)
def _rule(policy: ExitPolicy, candidates: tuple[int, ...], num_blocks: int) -> ExitBars | None:
    bars = [NEVER] * num_blocks + [ALWAYS]
    if policy.fixed_depth is not None:
        if policy.fixed_depth < num_blocks:
            bars[policy.fixed_depth] = ALWAYS
        return ExitBars(tuple(bars))
    last, threshold = policy.last(num_blocks), threshold_after(policy.threshold, policy.first_exit)
    if type(policy.criterion) is Doubt and policy.first_exit < last:
        doubts = threshold > 0
        if doubts:
            bars[policy.first_exit], bars[num_blocks] = ALWAYS, threshold
        return ExitBars(tuple(bars), (), policy.first_exit, doubts)
    bar, asks = _BARS.get(type(policy.criterion)), policy.criterion.scores_blocks
    if bar is None or (policy.first_exit >= last and not asks):
        return None
    asked = tuple(depth for depth in candidates if policy.first_exit <= depth <= last) if asks else (policy.first_exit,)
    for depth in asked:
        height = float(bar(threshold_after(policy.threshold, depth)))
        bars[depth] = NEVER if math.isnan(height) else height
    return ExitBars(tuple(bars), asked, None if asks else policy.first_exit)
