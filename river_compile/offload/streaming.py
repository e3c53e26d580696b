"""Runs blocks whose weights are offloaded: brings them in, and the next block's while this one runs.

A streamed step brings in only weights that are elsewhere at that moment, so a graph that was compiled before they left,
or runs after they came back, needs nothing else. What was brought in for a block that the token does not reach goes at
the end of the step. Threads share nothing.

Not handled: capture. On a GPU the block computes with copies at another address every time.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.weak import TensorWeakRef

from river_compile.lowering.native import Callee
from river_compile.offload.store import Arrival, Stored
from river_compile.offload.weights import OffloadedWeights
from river_compile.passes.program import Program, SegmentSpec
from river_compile.runtime.units import Step
from river_compile.upstream.tensors import version_of


@dataclass(frozen=True)
class _Brought:
    """Weights that were brought in, or are on their way; the versions tell whether somebody changed them since."""

    weights: tuple[Tensor, ...]
    versions: tuple[int, ...]
    stored: tuple[Stored, ...]
    arrival: Arrival

    def serves(self, weights: Sequence[Tensor]) -> bool:
        """Tells whether these are copies of these weights as they are now."""
        same = [id(w) for w in weights] == [id(w) for w in self.weights]
        return same and self.versions == tuple(map(version_of, weights))


class _Ahead(threading.local):
    """A thread's prefetch of the next block."""

    brought: _Brought | None = None


class Streamer:
    """Brings in the weights of one graph's offloaded blocks: those after the first `offload`, none for None."""

    def __init__(
        self, offloaded: OffloadedWeights, program: Program, inputs: Sequence[Any], offload: int | None
    ) -> None:
        self._offloaded = offloaded
        blocks = () if offload is None else program.blocks[offload:]
        self._places = {s: [place for place, i in enumerate(s.inputs) if program.is_parameter(i)] for s in blocks}
        self._weights = {s: [TensorWeakRef(inputs[s.inputs[i]]) for i in self._places[s]] for s in blocks}
        self._next = dict(itertools.pairwise(blocks))
        self._ahead = _Ahead()

    def step(self, segment: SegmentSpec, callee: Callee, packed: Sequence[Tensor]) -> Step:
        """Returns the step of a segment: a streamed one for a block that may be offloaded."""
        if segment not in self._weights:
            return Step(segment, callee, packed)
        return Step(segment, functools.partial(self._run, segment, self._places[segment], callee), packed, moves=True)

    def forget(self) -> None:
        """Drops unused prefetched weights, at the end of a step."""
        ahead, self._ahead.brought = self._ahead.brought, None
        if ahead is not None:
            self._offloaded.store.release(ahead.stored)

    def _run(self, block: SegmentSpec, parameters: Sequence[int], callee: Callee, args: list[Any]) -> Sequence[Any]:
        """Runs a block, with its weights brought in if they are elsewhere."""
        away = [i for i in parameters if self._offloaded.find(args[i]) is not None]
        if not away:
            return callee(args)
        brought = self._bring(block, [args[i] for i in away])
        for i, tensor in zip(away, brought.arrival.tensors, strict=True):
            args[i] = tensor
        try:
            return callee(args)
        finally:
            self._offloaded.store.release(brought.stored)

    def _bring(self, block: SegmentSpec, weights: Sequence[Tensor]) -> _Brought:
        """Brings weights of a block in, all of which are elsewhere, and begins with the next block's."""
        ahead = self._ahead.brought
        brought = ahead if ahead is not None and ahead.serves(weights) else self._start(weights)
        following = [ref() for ref in self._weights[self._next[block]]] if block in self._next else []
        self._ahead.brought = self._start([w for w in following if w is not None])
        self._offloaded.store.await_arrival(brought.arrival)
        self._offloaded.sample()
        return brought

    def _start(self, weights: Sequence[Tensor]) -> _Brought:
        """Begins to bring in those of the weights that are elsewhere."""
        found = [(weight, self._offloaded.find(weight)) for weight in weights]
        away = {weight: stored for weight, stored in found if stored is not None}
        arrival = self._offloaded.store.start(tuple(away.values()))
        self._offloaded.sent_for(sum(weight.nbytes for weight in away))
        return _Brought(tuple(away), tuple(map(version_of, away)), tuple(away.values()), arrival)
