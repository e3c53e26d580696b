"""Stores for weights outside of device memory: mapped files of a model on a CPU, pinned host memory of one on a GPU.

Not handled: which weights lie there, and when they come (:mod:`river_compile.runtime.offload`).
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from river_compile.config import RiverConfig
from river_compile.errors import OptionError, RiverWarning
from river_compile.kernels.messages import with_id
from river_compile.passes.program import DecoderPlan
from river_compile.system import MADV_PAGEOUT, advise, file_system, peak_bytes, reserve, resident_bytes, trim_heap

_TMPFS = {"tmpfs", "ramfs"}


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
                f"({str(error).splitlines()[0]}). Offload fewer layers",
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
