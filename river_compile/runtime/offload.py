"""Offloading: the weights of blocks deeper than ``offload=k`` leave device memory; their twins stay.

A parameter keeps its identity and can be read as before, but its memory is a mapped file (CPU) or pinned host memory
(GPU). Weights move when a decode graph is compiled, after its twins are packed. Not handled: capture of offloaded
blocks, parameters that the caller replaces (``p.data = ...``) after they moved, and several GPUs.
"""

from __future__ import annotations

import functools
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.config import RiverConfig
from river_compile.errors import OptionError
from river_compile.lowering.native import Callee
from river_compile.passes.nodes import input_name, is_ordinary, is_parameter, value_of
from river_compile.passes.program import DecoderPlan, Program, SegmentSpec
from river_compile.runtime.placement import Placement, Steps
from river_compile.runtime.units import Step
from river_compile.runtime.weight_store import Arrival, Stored, WeightStore, make_store
from river_compile.upstream.tensors import parts_of, version_of

log = logging.getLogger("river_compile.runtime.offload")

_MIN_BYTES = 4096  # one page; smaller weights are not worth a mapping


@dataclass
class OffloadStats:
    """What is offloaded of a model, for its report; sizes in bytes."""

    blocks: tuple[int, int]  # first and last, from 1
    policy: str | None
    where: str
    weights: int  # parameters and packed twins
    moved: int
    resident: int
    kept: int  # of offloaded blocks, in device memory
    peak_before: int  # of memory, until they moved
    peak_after: int  # since then
    brought_in: int  # since then

    def lines(self) -> Iterator[str]:
        """Yield lines for people."""
        first, last = self.blocks
        share = 100 * self.resident / self.weights
        yield f"  offloaded      layers {first} to {last}, {_mb(self.moved)} in {self.where}; {self.policy!r}"
        yield f"    resident     {self.resident / 1e6:.1f} of {_mb(self.weights)} of weights and twins ({share:.0f} %)"
        yield (
            f"    peak memory  {_mb(self.peak_before)} before, {_mb(self.peak_after)} since; "
            f"{_mb(self.brought_in)} brought in"
        )


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


class OffloadedWeights(Placement):
    """The offloaded weights of one model, each held as long as its parameter lives."""

    def __init__(self) -> None:
        self._stored: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._lock = threading.Lock()
        self.store = WeightStore()
        self.stats: OffloadStats | None = None  # None while nothing is offloaded

    def find(self, weight: Tensor) -> Stored | None:
        """Return the store's tensors for a weight, None if it is in device memory."""
        stored = self._stored.get(weight)
        return stored if stored is not None and stored.tensor.data_ptr() == weight.data_ptr() else None

    def check(self, plan: DecoderPlan, config: RiverConfig) -> None:
        if config.offload is None or self.stats is not None:
            return
        deeper = [node for node, part in plan.part_of.items() if config.offload < part <= plan.num_blocks]
        weights = {weight for node in deeper for weight in node.all_input_nodes if is_parameter(weight)}
        quantized = next((weight for weight in weights if not is_ordinary(value_of(weight))), None)
        if quantized is not None:
            raise OptionError(
                f"offload={config.offload} is not available for weights of type {type(value_of(quantized)).__name__}, "
                f"such as {input_name(quantized)}. Remove offload, or load the model unquantized",
                id="RC004",
            )
        self.store = make_store(config, plan)
        self.store.check_room(sum(value_of(weight).nbytes for weight in weights))

    def arrange(self, program: Program, inputs: Sequence[Any], config: RiverConfig, packed_bytes: int) -> None:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            weights = [value for i, value in enumerate(inputs) if program.is_parameter(i)]
            resident = program.num_blocks if config.offload is None else config.offload
            away, kept = _movable(program, inputs, resident)
            leave = set(map(id, away))
            self._bring_back(weight for weight in weights if id(weight) not in leave)
            if not away:
                self.stats = None
                return
            before = self.stats  # of another graph of the same model, whose counts continue
            peak = self.store.peak() if before is None else before.peak_before
            self._put([weight for weight in away if self.find(weight) is None])
            moved, everything = _bytes(away), _bytes(weights) + packed_bytes
            self.stats = OffloadStats(
                blocks=(resident + 1, program.num_blocks),
                policy=config.offload_policy,
                where=self.store.where,
                weights=everything,
                moved=moved,
                resident=everything - moved,
                kept=_bytes(kept),
                peak_before=peak,
                peak_after=0 if before is None else before.peak_after,
                brought_in=0 if before is None else before.brought_in,
            )
            self.sample()
            log.info("offloaded layers %d to %d, %.1f MB", *self.stats.blocks, moved / 1e6)

    def steps(self, program: Program, inputs: Sequence[Any], config: RiverConfig) -> Steps:
        if config.offload is None:
            return Steps()
        streamer = Streamer(self, program, inputs, config.offload)
        return Steps(streamer.step, streamer.release_prefetched)

    def restore(self, weights: Iterable[Tensor]) -> int:
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.stats = None
            return self._bring_back(weights)

    def to_dict(self) -> dict[str, object]:
        stats = self.sample()
        return {"offloaded": None if stats is None else {**asdict(stats), "blocks": [*stats.blocks]}}

    def lines(self) -> Iterator[str]:
        stats = self.sample()
        if stats is not None:
            yield from stats.lines()

    def sample(self) -> OffloadStats | None:
        """Update the peak memory and return the stats, None while nothing is offloaded."""
        if self.stats is not None:
            self.stats.peak_after = max(self.stats.peak_after, self.store.memory())
        return self.stats

    def _put(self, weights: Sequence[Tensor]) -> None:
        with tqdm(weights, desc="river: offloading", unit="weight", leave=False, delay=1) as bar:
            stored = [self.store.put(weight) for weight in bar]
        for weight, new in zip(weights, stored, strict=True):
            original = weight.data
            weight.data = new.tensor
            self._stored[weight] = new
            self.store.discard(original)
            del original
        self.store.trim()

    def _bring_back(self, weights: Iterable[Tensor]) -> int:
        size = 0
        for weight in weights:
            stored = self.find(weight)
            if stored is not None:
                weight.data = self.store.take_back(stored)
                size += weight.nbytes
            self._stored.pop(weight, None)
        return size


class Streamer:
    """Fetches the weights of one graph's blocks after the first `offload`, and prefetches the next block's."""

    def __init__(self, offloaded: OffloadedWeights, program: Program, inputs: Sequence[Any], offload: int) -> None:
        self._offloaded, blocks = offloaded, program.blocks[offload:]
        self._places = {s: [place for place, i in enumerate(s.inputs) if program.is_parameter(i)] for s in blocks}
        self._weights = {s: [TensorWeakRef(inputs[s.inputs[i]]) for i in self._places[s]] for s in blocks}
        self._next = dict(itertools.pairwise(blocks))
        self._ahead = threading.local()  # `fetch`: this thread's prefetch of the next block

    def step(self, segment: SegmentSpec, callee: Callee, packed: Sequence[Tensor]) -> Step:
        """Return the step of a segment, which fetches weights if the segment may be offloaded."""
        if segment not in self._weights:
            return Step(segment, callee, packed)
        return Step(segment, functools.partial(self._run, segment, self._places[segment], callee), packed, moves=True)

    def release_prefetched(self) -> None:
        """Release weights of a block that the token did not reach, at the end of a step."""
        ahead, self._ahead.fetch = getattr(self._ahead, "fetch", None), None
        if ahead is not None:
            self._offloaded.store.release(ahead.stored)

    def _run(self, block: SegmentSpec, parameters: Sequence[int], callee: Callee, args: list[Any]) -> Sequence[Any]:
        # Asked at every call: the graph may be older than the move, or the weights may be back.
        away = [i for i in parameters if self._offloaded.find(args[i]) is not None]
        if not away:
            return callee(args)
        fetch = self._fetch(block, [args[i] for i in away])
        for i, tensor in zip(away, fetch.arrival.tensors, strict=True):
            args[i] = tensor
        try:
            return callee(args)
        finally:
            self._offloaded.store.release(fetch.stored)

    def _fetch(self, block: SegmentSpec, weights: Sequence[Tensor]) -> _Fetch:
        ahead: _Fetch | None = getattr(self._ahead, "fetch", None)
        fetch = ahead if ahead is not None and ahead.matches(weights) else self._start(weights)
        following = [ref() for ref in self._weights[self._next[block]]] if block in self._next else []
        self._ahead.fetch = self._start([w for w in following if w is not None])
        self._offloaded.store.await_arrival(fetch.arrival)
        self._offloaded.sample()
        return fetch

    def _start(self, weights: Sequence[Tensor]) -> _Fetch:
        found = [(weight, self._offloaded.find(weight)) for weight in weights]
        away = {weight: stored for weight, stored in found if stored is not None}
        arrival = self._offloaded.store.start(tuple(away.values()))
        if self._offloaded.stats is not None:
            self._offloaded.stats.brought_in += sum(weight.nbytes for weight in away)
        return _Fetch(tuple(away), tuple(map(version_of, away)), tuple(away.values()), arrival)


@dataclass(frozen=True)
class _Fetch:
    weights: tuple[Tensor, ...]
    versions: tuple[int, ...]  # of the weights when the fetch began
    stored: tuple[Stored, ...]
    arrival: Arrival

    def matches(self, weights: Sequence[Tensor]) -> bool:
        """True if these are the weights, unchanged since."""
        same = [id(w) for w in weights] == [id(w) for w in self.weights]
        return same and self.versions == tuple(map(version_of, weights))


def _movable(program: Program, inputs: Sequence[Any], resident: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights of the blocks after the first `resident`: those that can move, and those that stay."""
    blocks = program.blocks[resident:]
    stay = {slot for segment in program.segments if segment not in blocks for slot in segment.inputs}
    users = Counter(_address(value) for i, value in enumerate(inputs) if program.is_parameter(i))
    slots = dict.fromkeys(slot for segment in blocks for slot in segment.inputs if program.is_parameter(slot))
    split: dict[bool, list[Tensor]] = {True: [], False: []}
    for slot in slots:
        weight = inputs[slot]
        movable = is_ordinary(weight) and weight.nbytes >= _MIN_BYTES and _is_dense(weight)
        split[movable and slot not in stay and users[_address(weight)] == 1].append(weight)
    return split[True], split[False]


def _is_dense(weight: Tensor) -> bool:
    """True if a tensor's elements have no gaps between them, in any order."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return span == weight.numel()


def _address(weight: Tensor) -> int:
    return parts_of(weight)[0].untyped_storage().data_ptr()


def _bytes(weights: Iterable[Tensor]) -> int:
    """Return the size of weights; memory that several share counts once."""
    return sum({_address(weight): weight.nbytes for weight in weights}.values())
