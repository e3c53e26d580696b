"""The walk of one token over a program's segments: blocks up to its exit, then twins and head, then perhaps a doubt.

Where tokens may part, a subclass says which way it goes: :class:`HostWalk` compares numbers, and
:class:`river_compile.capture.device_exits.DeviceWalk` leaves both ways to conditional nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from river_compile.exits import ExitBars, Taken
from river_compile.runtime.runner import Runner


class Walk(ABC):
    """One step.

    Attributes:
        runner: runs the spans.
        num_blocks: L.
        doubts: whether the backbone may have to run after the river.
        hand_over: sees to the results of a head that has run; None: nothing is to be done with them.
    """

    runner: Runner
    num_blocks: int
    doubts: bool
    hand_over: Callable[[list], None] | None = None

    def run(self, slots: list, stops: tuple[int, ...], last: int, done: int = 0) -> int:
        """Runs what follows `done` blocks of a token that leaves at one of `stops`, or after `last` blocks."""
        for number, depth in enumerate(stops, 1):
            leaves = self.fork(slots, done, depth, stops[number:], last)
            if leaves is None:
                return depth
            done = depth
            if leaves:
                last = depth
                break
        else:
            self.runner.blocks(slots, done, last)
        may_doubt = self.doubts and last < self.num_blocks
        saved = self.runner.save(slots, last) if may_doubt else ()
        if last < self.num_blocks:
            self.runner.tail(slots, last)
        if self.hand_over is not None:
            self.hand_over(slots)
        if may_doubt:

            def once_more(own: list) -> None:
                self.runner.rewind(own, last, self.num_blocks, saved)
                self.runner.blocks(own, last, self.num_blocks)
                if self.hand_over is not None:
                    self.hand_over(own)

            self.doubt(slots, once_more)
        return last

    @abstractmethod
    def fork(self, slots: list, done: int, depth: int, rest: tuple[int, ...], last: int) -> bool | None:
        """Runs blocks done+1..depth and says whether the token leaves; None where it saw to the rest of the step."""

    @abstractmethod
    def doubt(self, slots: list, once_more: Callable[[list], None]) -> None:
        """Runs the backbone once more where the river's answer is not believed."""


class HostWalk(Walk):
    """A step whose scores the host waits for and compares; `stops` and `last` are for :meth:`run`.

    Args:
        limit: blocks that the token may execute before its exit.
    """

    def __init__(self, runner: Runner, bars: ExitBars, limit: int) -> None:
        self.runner, self.num_blocks, self.doubts = runner, len(bars.bars) - 1, bars.reads == "answer"
        self._bars, last = bars, bars.last
        self.stops = bars.stops if limit >= last else tuple(stop for stop in bars.stops if stop <= limit)
        self._entropy = None if bars.given is None else bars.given.item()
        if self._entropy is not None and bars.leaves(bars.first, -self._entropy):
            last = bars.first
        self.last = min(last, limit)
        self._scores: list[float] = []
        self._doubted = False

    def taken(self, depth: int) -> Taken:
        """Returns the way that the step took, given the depth at which the token left."""
        end, river_from = (self.num_blocks, depth) if self._doubted else (depth, None)
        return Taken(end, tuple(self._scores), self._entropy, river_from)

    def fork(self, slots: list, done: int, depth: int, rest: tuple[int, ...], last: int) -> bool:
        if depth < self._bars.first:
            self.runner.blocks(slots, done, depth)
            return False
        self._scores.append(self.runner.score(slots, done, depth))
        return self._bars.leaves(depth, self._scores[-1])

    def doubt(self, slots: list, once_more: Callable[[list], None]) -> None:
        self._entropy = self.runner.read_head(slots)
        self._doubted = not self._bars.leaves(self.num_blocks, -self._entropy)
        if self._doubted:
            once_more(slots)
