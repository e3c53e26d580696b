"""The inputs and outcomes of decisions on the device: one row for each depth, at fixed addresses.

A fork's *verdict* says whether a token leaves there. Where the kernel of an exit check makes it
(``river::residual_verdict``), rule and verdict are operands of that kernel; elsewhere :meth:`DeviceExitState.decide`
makes it from a score, in a few small kernels. Rows lie 16 bytes apart, as compiled code expects of any tensor.

Not handled: when a fork is reached, and what follows (:mod:`river_compile.capture.device_exits`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from river_compile.capture.units import copy_into
from river_compile.exits import NEVER

_LEAVES, _STAYS = 4, 5  # the bytes of a row of `outcome` behind the score


class DeviceExitState:
    """The rows of one graph.

    Args:
        num_blocks: L.
        device: where they lie.

    Attributes:
        rules: float64 ``[L + 1, 2]``: at each depth the bar (:mod:`river_compile.exits`), and a number of no use.
        outcome: float32 ``[L + 1, 4]``: the score, in the next number's bytes the booleans "leaves" and "stays", and
            two of no use. The last row is of the river's answer, and has "stays" alone: where it is doubted.
        given: float32 scalar, the score where a fork has none of its own.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self._last = num_blocks
        with torch.inference_mode(False), torch.device(device):
            self.rules = torch.zeros(num_blocks + 1, 2, dtype=torch.float64)
            self.outcome = torch.full((num_blocks + 1, 4), math.nan, dtype=torch.float32)
            self.given = torch.full((), math.nan, dtype=torch.float32)
            self._flags = self.outcome.view(torch.bool)
        self.forbid()

    def of(self, depth: int) -> list[Tensor]:
        """Returns the operands of the check after `depth` blocks."""
        return [self.rules[depth, :1], self.outcome[depth]]

    def leaves(self, depth: int) -> Tensor:
        """Returns the boolean scalar that holds where a token leaves at a fork."""
        return self._flags[depth, _LEAVES]

    def stays(self, depth: int) -> Tensor:
        """Returns the boolean scalar that holds where a token stays at a fork; at L, where the river is doubted."""
        return self._flags[depth, _STAYS]

    def forbid(self) -> None:
        """Makes the rule one at which no token leaves."""
        self.rules[:, 0] = NEVER

    def decide(self, depth: int, score: Tensor) -> None:
        """Compares a float32 scalar with the bar of a fork, as the check's kernel does, and notes the verdict."""
        copy_into([self.outcome[depth, 0]], [score])
        stays_at(score, self.rules[depth, 0], self.stays(depth))
        torch.logical_not(self.stays(depth), out=self.leaves(depth))

    def doubt(self, entropy: Tensor) -> None:
        """Decides in the same way about the river's answer, by the entropy of its logits; "stays": it is doubted."""
        score = torch.neg(entropy, out=self.outcome[self._last, 0])
        stays_at(score, self.rules[self._last, 0], self.stays(self._last))

    def read(self, outcome: Tensor, forks: Sequence[int], last: int, doubts: bool) -> list[float]:
        """Returns the score at each depth, that of the river's answer, and the depth at which a token left.

        Args:
            outcome: a copy of the attribute in host memory, float32 ``[4 L + 4]``.
            forks: where tokens may part, ascending.
            last: the depth of a token that leaves at none of them.
            doubts: whether the river may have been doubted.

        Returns:
            L + 2 numbers; the depth is NaN where a step left no verdict.
        """
        rows = outcome.view(-1, 4)
        flags = rows.view(torch.uint8)[:, [_LEAVES, _STAYS]].tolist()
        decided = ((depth, leaves, stays) for depth in forks for leaves, stays in [flags[depth]])
        depth: float = next((d if leaves else math.nan for d, leaves, stays in decided if leaves or not stays), last)
        if doubts and depth < self._last and flags[self._last][1]:
            depth = self._last
        return [*rows[:, 0].tolist(), depth]


def stays_at(score: Tensor, bar: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns whether a token stays: a bool of a score in float32 or float64 and a float64 bar, all scalars.

    It does where the score is no number, and does not at a bar that is none.
    """
    return torch.le(torch.fmax(score, bar), bar, out=out)
