"""Runs the segments of one rank: each number that decides is the first rank's on all of them.

A check costs one broadcast of 4 bytes, and only where it is read: tokens whose depth is known exchange nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from river_compile.distributed.ranks import Ranks
from river_compile.passes.program import RiverProgram, Segment
from river_compile.runtime.runner import PlainRunner, Step
from river_compile.runtime.slots import SCORE, Slots
from river_compile.upstream.tensors import local_of


class RankRunner(PlainRunner):
    """A plain runner whose scores all ranks agree on.

    Args:
        ranks: that share the model.
        checks: compare what they are given and what they compute before they agree, to the bit.
    """

    def __init__(self, program: RiverProgram, steps: Mapping[Segment, Step], ranks: Ranks, checks: bool) -> None:
        super().__init__(program, steps)
        self._ranks, self._checks = ranks, checks

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        """Ends a step; raises a RankError if it failed because another rank is gone."""
        self._ranks.explain(error)

    def begin(self, args: Sequence, slots: Slots | None = None) -> Slots:
        if self._checks:
            ids = [arg for arg in args if isinstance(arg, Tensor) and not arg.is_floating_point() and arg.dim() == 2]
            self._ranks.check_alike("the tokens, positions and masks that they are given", list(map(_digest, ids)))
        return super().begin(args, slots)

    def read_score(self, slots: list, depth: int) -> float:
        return self.head_score(slots).item()

    def head_score(self, slots: list) -> Tensor:
        if self._checks:
            self._ranks.check_alike("a score", str(slots[SCORE].item()))
        return self._ranks.first(slots[SCORE])


def called_on_shards(
    executor: Callable[..., Any], placeholders: Sequence[fx.Node], local: frozenset[fx.Node]
) -> Callable[..., Any]:
    """Returns an executor as Dynamo calls it: with parameters whose local shards are the graph's inputs.

    Args:
        executor: takes the shards, and anything for inputs that its graph does not use.
        placeholders: of the graph, in order.
        local: those that stand for shards. None: the executor is returned.
    """
    if not local:
        return executor
    places = [i for i, node in enumerate(placeholders) if node in local]
    unused = [i for i, node in enumerate(placeholders) if not node.users and node not in local]

    def call(*args: Any) -> Any:
        mine = list(args)
        for place in places:
            mine[place] = local_of(mine[place])
        for place in unused:
            mine[place] = None
        return executor(*mine)

    return call


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().contiguous().numpy().data).hexdigest()[:12]
