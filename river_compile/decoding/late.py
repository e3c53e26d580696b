"""What is asked of a device that runs late (a GPU), so that the host waits for it in :func:`read` or `coming` alone.

A tensor that is made of the host's numbers there, and an index that is a list, are copies which the host waits for; so
is every `tolist`, `item` and `bool`. On a CPU, where nothing runs late, the same functions are what they say and no
more. Not handled: devices that run late and are not CUDA's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def read(*tensors: Tensor) -> list[list[float]]:
    """Returns the elements of each tensor of numbers; the host waits once, for all that was asked before."""
    if len(tensors) < 2:
        return [tensors[0].flatten().tolist()] if tensors else []
    values = iter(torch.cat([tensor.flatten().double() for tensor in tensors]).tolist())
    return [[*islice(values, tensor.numel())] for tensor in tensors]


def coming(tensor: Tensor) -> Callable[[], list]:
    """Begins to bring a tensor to the host, and returns what waits for it and returns its elements.

    Work that is asked for in between is not waited for.
    """
    if not tensor.is_cuda:
        return tensor.tolist
    here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(tensor.device))

    def wait() -> list:
        there.synchronize()
        elements: list = here.tolist()
        return elements

    return wait


def sent(values: Sequence[Any], device: torch.device) -> Tensor:
    """Returns a tensor of integers of the host's on a device."""
    late = device.type == "cuda"
    return torch.tensor(values, dtype=torch.long, pin_memory=late).to(device, non_blocking=True)


def mark(device: torch.device) -> Any:
    """Returns a mark after everything that a device was asked so far."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: Any, second: Any) -> float:
    """Returns the device's time between two marks; waits until it has reached them."""
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1e3
