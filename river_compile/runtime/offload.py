"""Offloading: the weights of blocks deeper than ``offload=k`` leave device memory; their twins stay.

A parameter keeps its identity and can be read as before, but its memory is a mapped file (CPU) or pinned host memory
(GPU). Weights move when a decode graph is compiled, after its twins are packed. Not handled: capture of offloaded
blocks, parameters that the caller replaces (``p.data = ...``) after they moved, and several GPUs.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import mmap
import os
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary
from tqdm import tqdm

from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.kernels.messages import with_id
from river_compile.lowering.native import Callee
from river_compile.passes.nodes import input_name, is_ordinary, is_parameter, value_of
from river_compile.passes.program import DecoderPlan, Program, SegmentSpec
from river_compile.runtime.units import Step
from river_compile.system import MADV_PAGEOUT, advise, file_system, peak_bytes, reserve, resident_bytes, trim_heap
from river_compile.upstream.tensors import parts_of, version_of

log = logging.getLogger("river_compile.runtime.offload")

_MIN_BYTES = 4096  # one page; smaller weights are not worth a mapping
_TMPFS = {"tmpfs", "ramfs"}


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


class OffloadedWeights:
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
        """Raise an OptionError, before packing, if weights are quantized or have no place to go."""
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
        """Move weights of a decode graph out or back; raise an OptionError, before any moves, without room."""
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
            log.info("offloaded blocks %d to %d, %.1f MB", *self.stats.blocks, moved / 1e6)

    def restore(self, weights: Iterable[Tensor]) -> int:
        """Move weights back into device memory; return their bytes."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self.stats = None
            return self._bring_back(weights)

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

    def __init__(
        self, offloaded: OffloadedWeights, program: Program, inputs: Sequence[Any], offload: int | None
    ) -> None:
        self._offloaded = offloaded
        blocks = () if offload is None else program.blocks[offload:]
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


@dataclass(frozen=True)
class Stored:
    # Has the shape, strides, dtype and device of the original and may replace it; takes no device memory, slow to read.
    tensor: Tensor
    source: Tensor  # that a store copies from, often `tensor` itself


@dataclass(frozen=True)
class Arrival:
    tensors: tuple[Tensor, ...]  # to compute with after `WeightStore.await_arrival`
    event: Any = None  # on the device; None: nothing to wait for


class WeightStore:
    """Keeps weights outside of device memory; this base class keeps them where they are."""

    where = "device memory"  # for users

    def check_room(self, nbytes: int) -> None:
        """Raise an OptionError if the store is known to be too small."""

    def put(self, tensor: Tensor) -> Stored:
        """Copy a tensor here; raise an OptionError if there is no room."""
        return Stored(tensor, tensor)

    def take_back(self, stored: Stored) -> Tensor:
        """Return a copy in ordinary device memory."""
        return torch.empty_like(stored.tensor).copy_(stored.source)

    def discard(self, tensor: Tensor) -> None:
        """Free the memory of an original that was copied here and is no longer used."""

    def trim(self) -> None:
        """Return freed memory to the system."""

    def start(self, weights: Sequence[Stored]) -> Arrival:
        """Start to fetch weights, without waiting for them."""
        return Arrival(tuple(stored.tensor for stored in weights))

    def await_arrival(self, arrival: Arrival) -> None:
        """Order later calls after the arrival."""

    def release(self, weights: Sequence[Stored]) -> None:
        """Drop fetched weights after use."""

    def memory(self) -> int:
        return 0  # bytes in use by the process (CPU) or on the device

    def peak(self) -> int:
        return 0  # largest value of `memory` so far


def make_store(config: RiverConfig, plan: DecoderPlan) -> WeightStore:
    return MappedFiles(config.offload_dir) if plan.device.type == "cpu" else PinnedMemory(plan.device)


class MappedFiles(WeightStore):
    """Unnamed mapped files, for a model on the CPU; raises an OptionError if the folder takes none."""

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = Path(folder or os.environ.get("TMPDIR") or "/var/tmp")  # /tmp may be in memory
        try:
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise OptionError(
                f"Cannot write to offload_dir={str(self._folder)!r} ({error.strerror}). Name a folder on a disk",
                id="RC080",
            ) from error
        self.where = f"memory-mapped files in {self._folder}"

    def check_room(self, nbytes: int) -> None:
        free = shutil.disk_usage(self._folder).free
        if nbytes > free:
            raise self._no_room(nbytes, free)
        if file_system(self._folder) in _TMPFS:
            why = f"offload_dir={str(self._folder)!r} is in memory (tmpfs), so offloading saves nothing"
            warnings.warn(with_id("RC081", f"{why}. Name a folder on a disk"), RiverWarning, stacklevel=2)

    def _no_room(self, nbytes: int, free: int) -> OptionError:
        return OptionError(
            f"offload_dir={str(self._folder)!r} has {free / 1e6:.1f} MB free, and the weights take "
            f"{nbytes / 1e6:.1f} MB. Make room, or name another folder",
            id="RC080",
        )

    def put(self, tensor: Tensor) -> Stored:
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            try:
                reserve(file.fileno(), tensor.nbytes)  # a page without room would be a SIGBUS later
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise self._no_room(tensor.nbytes, shutil.disk_usage(self._folder).free) from error
                raise
            mapping = mmap.mmap(file.fileno(), tensor.nbytes)
        flat = torch.frombuffer(mapping, dtype=tensor.dtype)  # holds the mapping
        stored = flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        done = Stored(stored, stored)
        self.release([done])
        return done

    def discard(self, tensor: Tensor) -> None:
        advise(tensor.untyped_storage(), MADV_PAGEOUT, inside=True)  # it may be a mapped checkpoint

    def trim(self) -> None:
        trim_heap()

    def start(self, weights: Sequence[Stored]) -> Arrival:
        for stored in weights:
            advise(stored.tensor.untyped_storage(), mmap.MADV_WILLNEED)
        return super().start(weights)  # a read waits for its page

    def release(self, weights: Sequence[Stored]) -> None:
        for stored in weights:  # shared mappings: the content stays in the file
            advise(stored.tensor.untyped_storage(), mmap.MADV_DONTNEED)

    def memory(self) -> int:
        return resident_bytes()

    def peak(self) -> int:
        return peak_bytes()


class PinnedMemory(WeightStore):
    """Pinned host memory, for a model on a GPU that can address it; blocks run with copies in device memory."""

    where = "pinned host memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def put(self, tensor: Tensor) -> Stored:
        try:
            host = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)  # torch rounds up to a power of two
        except RuntimeError as error:
            raise OptionError(
                f"Cannot allocate {tensor.nbytes / 1e6:.1f} MB of pinned host memory for offload= "
                f"({str(error).splitlines()[0]}). Offload fewer blocks",
                id="RC080",
            ) from error
        values = host.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()).copy_(tensor)
        array = {"shape": host.shape, "typestr": "|u1", "data": (host.data_ptr(), False), "strides": None, "version": 3}
        pointer = SimpleNamespace(__cuda_array_interface__=array, host=host)  # the tensor keeps it alive
        seen = torch.as_tensor(pointer, device=self._device)
        if seen.data_ptr() != host.data_ptr():
            raise OptionError(
                f"offload= requires a device that can address pinned host memory, and {self._device} cannot. Remove "
                "offload",
                id="RC080",
            )
        return Stored(seen.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()), values)

    def trim(self) -> None:
        torch.cuda.empty_cache()

    def start(self, weights: Sequence[Stored]) -> Arrival:
        with torch.inference_mode(False):
            # Allocated on the caller's stream, which uses them: the copies wait for earlier work in that memory.
            tensors = tuple(
                torch.empty_strided(s.tensor.shape, s.tensor.stride(), dtype=s.tensor.dtype, device=self._device)
                for s in weights
            )
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for tensor, stored in zip(tensors, weights, strict=True):
                tensor.copy_(stored.source, non_blocking=True)
                tensor.record_stream(self._stream)  # it may be dropped before the copy has run
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arrival(tensors, event)

    def await_arrival(self, arrival: Arrival) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrival.event)

    def memory(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


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
