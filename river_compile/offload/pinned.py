"""Offloaded weights of a model on a GPU: pinned host memory, which the device can address.

A weight's tensor stays one of the device, but its memory is the host's, which a kernel may read over the bus (unified
addressing): compiled code, guards, ``state_dict`` and the plain model see no difference. For speed, a block that River
runs gets copies in device memory, made on a stream of their own beside the block before.

PyTorch's allocator rounds pinned memory up to a power of two. Not handled: a device that cannot address pinned memory
(an error says so), and more than one device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from river_compile.errors import OptionError
from river_compile.offload.store import Arrival, Stored, WeightStore


class _DevicePointer:
    """Pinned host memory as `torch.as_tensor` takes memory of the device."""

    def __init__(self, host: Tensor) -> None:
        self.host = host  # lives as long as the tensor that is made of this
        self.__cuda_array_interface__ = {
            "shape": (host.nbytes,),
            "typestr": "|u1",
            "data": (host.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


class PinnedMemory(WeightStore):
    """The store of a model on a GPU."""

    where = "pinned host memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def put(self, tensor: Tensor) -> Stored:
        try:
            host = torch.empty(tensor.nbytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise OptionError(
                f"offload= found no {tensor.nbytes / 1e6:.1f} MB of pinned host memory; offload fewer blocks "
                f"({str(error).splitlines()[0]})"
            ) from error
        values = host.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())
        values.copy_(tensor)
        seen = torch.as_tensor(_DevicePointer(host), device=self._device)
        if seen.data_ptr() != host.data_ptr():
            raise OptionError(
                f"offload= needs a device that can address pinned host memory, and {self._device} cannot; leave it out"
            )
        return Stored(seen.view(tensor.dtype).as_strided(tensor.shape, tensor.stride()), values)

    def settle(self) -> None:
        torch.cuda.empty_cache()

    def start(self, weights: Sequence[Stored]) -> Arrival:
        with torch.inference_mode(False):
            # Allocated on the caller's stream, where they are used: the copies wait for what ran in that memory before.
            tensors = tuple(
                torch.empty_strided(s.tensor.shape, s.tensor.stride(), dtype=s.tensor.dtype, device=self._device)
                for s in weights
            )
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), torch.no_grad():
            for tensor, stored in zip(tensors, weights, strict=True):
                tensor.copy_(stored.source, non_blocking=True)
                tensor.record_stream(self._stream)  # where it is dropped before the copy has run
            event = torch.cuda.Event()
            event.record(self._stream)
        return Arrival(tensors, event)

    def await_arrival(self, arrival: Arrival) -> None:
        torch.cuda.current_stream(self._device).wait_event(arrival.event)

    def memory(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)
