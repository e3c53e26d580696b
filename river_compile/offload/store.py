"""The interface of stores of offloaded weights: a file, and pinned host memory.

Not handled: which weights leave, and when (:mod:`river_compile.offload.weights`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor that lies elsewhere."""

    # has the shape, strides, dtype and device of the original, and may be used in its place: it takes no device memory,
    # and is slow to read
    tensor: Tensor
    source: Tensor  # what a store brings in from, `tensor` itself where there is no difference


@dataclass(frozen=True)
class Arrival:
    """Weights on their way in."""

    tensors: tuple[Tensor, ...]  # the tensors to compute with, once :meth:`WeightStore.await_arrival` has returned
    event: Any = None  # what the device must have reached before, None where there is nothing to wait for


class WeightStore:
    """Keeps weights outside of device memory and brings them in for the time of a block.

    This one is device memory itself: whatever is put there stays where it is.

    Attributes:
        where: the place, for people.
    """

    where = "device memory"

    def check_room(self, nbytes: int) -> None:
        """Makes sure that so many bytes will fit, as far as it can be known.

        Raises:
            OptionError: (a ``ValueError``) they will not.
        """

    def put(self, tensor: Tensor) -> Stored:
        """Copies a tensor here; the original may go afterwards.

        Raises:
            OptionError: (a ``ValueError``) there is no room.
        """
        return Stored(tensor, tensor)

    def take_back(self, stored: Stored) -> Tensor:
        """Returns a copy in ordinary device memory."""
        return torch.empty_like(stored.tensor).copy_(stored.source)

    def discard(self, tensor: Tensor) -> None:
        """Frees the memory of an original that was put here and that nobody uses any more."""

    def settle(self) -> None:
        """Gives freed memory back to the system."""

    def start(self, weights: Sequence[Stored]) -> Arrival:
        """Begins to bring weights in; returns before they have arrived."""
        return Arrival(tuple(stored.tensor for stored in weights))

    def await_arrival(self, arrival: Arrival) -> None:
        """Orders later calls after the arrival."""

    def release(self, weights: Sequence[Stored]) -> None:
        """Lets weights go that were brought in and have been used."""

    def memory(self) -> int:
        """Returns the bytes in use, of the process (CPU) or on the device."""
        return 0

    def peak(self) -> int:
        """Returns the largest value that :meth:`memory` had so far."""
        return 0
