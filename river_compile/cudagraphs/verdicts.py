"""What decisions on the device read and write: one row for each depth, in memory that stays where it is.

A fork's *verdict* says whether a token leaves there. Where the kernel of an exit check makes it
(``river::residual_verdict``), rule, verdict and the check's history are operands of that kernel; everywhere else
:meth:`Verdicts.decide` makes it from a score, in a few small kernels. Rows lie 16 bytes apart or a multiple of that, as
compiled code expects of any tensor.

Not handled: when a fork is reached, and what follows (:mod:`river_compile.cudagraphs.device_exits`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from river_compile.exit_rule import NEVER
from river_compile.exits import Scores

from .partition import copy_into

_LEAVES, _STAYS = 4, 5  # the bytes of a row of `outcome` behind the score


class Verdicts:
    """The rows of one graph.

    Args:
        num_blocks: L.
        device: where they lie.
        history: scores of a check that are averaged; 0: a score counts alone.

    Attributes:
        rules: float64 ``[L + 1, 2]``: at each depth the bar (:mod:`river_compile.exit_rule`), and 1 where a block is
            asked, else 0.
        outcome: float32 ``[L + 1, 4]``: the score, in the next number's bytes the booleans "leaves" and "stays", and
            two of no use. The last row is the entropy of a river that may be doubted, and "leaves" where it is.
        past: float32 ``[L + 1, history + 1]`` and what the distance of rows needs: a check's last scores, newest last,
            and how many there are; None without a history.
        given: float32 scalar, the score where a fork has none of its own.
    """

    def __init__(self, num_blocks: int, device: torch.device, history: int = 0) -> None:
        self._last, self._history = num_blocks, history
        with torch.inference_mode(False), torch.device(device):
            self.rules = torch.zeros(num_blocks + 1, 2, dtype=torch.float64)
            self.outcome = torch.full((num_blocks + 1, 4), math.nan, dtype=torch.float32)
            self.given = torch.full((), math.nan, dtype=torch.float32)
            self.past = torch.zeros(num_blocks + 1, -(-(history + 1) // 4) * 4) if history else None
            self._flags = self.outcome.view(torch.bool)
        self._held: object | None = None
        self.forbid()

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of what the kernel of a check is given beside its hidden states."""
        return ("rule", "verdict") if self.past is None else ("rule", "verdict", "past")

    def of(self, depth: int) -> list[Tensor]:
        """Returns the operands of the check after `depth` blocks."""
        rows = [self.rules[depth], self.outcome[depth]]
        return rows if self.past is None else [*rows, self.past[depth, : self._history + 1]]

    def leaves(self, depth: int) -> Tensor:
        """Returns the boolean scalar that holds where a token leaves at a fork; at L, where the river is doubted."""
        return self._flags[depth, _LEAVES]

    def stays(self, depth: int) -> Tensor:
        """Returns the boolean scalar that holds where a token does not leave at a fork."""
        return self._flags[depth, _STAYS]

    def forbid(self) -> None:
        """Makes the rule one at which no token leaves, and no score is asked for."""
        self.rules[:, 0] = NEVER
        self.rules[:, 1] = 0.0

    def decide(self, depth: int, score: Tensor) -> None:
        """Compares a float32 scalar with the bar of a fork, as the check's kernel does, and notes the verdict."""
        copy_into([self.outcome[depth, 0]], [score])
        compared = score if self.past is None or depth == 0 else self._mean(depth, score)
        stays_at(compared, self.rules[depth, 0], self.stays(depth))
        torch.logical_not(self.stays(depth), out=self.leaves(depth))

    def doubt(self, entropy: Tensor) -> None:
        """Decides in the same way whether the entropy of the river's logits, a float32 scalar, leaves doubt."""
        copy_into([self.outcome[self._last, 0]], [entropy])
        doubted_at(entropy, self.rules[self._last, 0], self.leaves(self._last))

    def hold(self, scores: Scores) -> Tensor | None:
        """Makes `past` that of another sequence; returns what must be copied there, None where it is there already."""
        assert self.past is not None, "a history is compared with by a rule that has one"
        if scores.holder is not None and scores.holder is self._held:
            return None
        rows = torch.zeros(self.past.shape)
        for depth in range(1, self._last):
            seen = scores.at(depth)
            rows[depth, self._history - len(seen) : self._history] = torch.tensor(seen)
            rows[depth, self._history] = len(seen)
        self._held = scores.holder = object()
        return rows

    def let_go(self) -> None:
        """Notes that checks may have run whose scores do not count."""
        self._held = None

    def read(self, outcome: Tensor, forks: Sequence[int], last: int, doubts: bool) -> list[float]:
        """Returns the score at each depth, the entropy of a doubted river, and the depth at which a token left.

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
        if doubts and depth < self._last and flags[self._last][0]:
            depth = self._last
        return [*rows[:, 0].tolist(), depth]

    def _mean(self, depth: int, score: Tensor) -> Tensor:
        """Remembers a score, where it is asked for and a number; returns the mean of the last ones, or else NaN."""
        assert self.past is not None
        row, n = self.past[depth, : self._history + 1], self._history
        last, seen = torch.cat([row[1:n], score.view(1)]), (row[n:] + 1).clamp(max=n)
        counts = (score == score) & (self.rules[depth, 1] > 0)
        torch.where(counts, torch.cat([last, seen]), row, out=row)
        total = last[0].double()
        for number in last[1:]:  # (in the order of the host's, since a sum's bits depend on it)
            total = total + number
        return torch.where(counts, total / seen[0], math.nan)


def stays_at(score: Tensor, bar: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns whether a token stays: a bool of a score in float32 or float64 and a float64 bar, all scalars.

    It does where the score is no number, and does not at a bar that is none.
    """
    return torch.le(torch.fmax(score, bar), bar, out=out)


def doubted_at(entropy: Tensor, bar: Tensor, out: Tensor | None = None) -> Tensor:
    """Returns whether an entropy leaves doubt, as above: it does where it is no number, but not at such a bar."""
    return torch.ge(entropy.nan_to_num(NEVER, NEVER, -NEVER), bar, out=out)
