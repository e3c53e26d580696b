"""Where offloaded weights lie, apart from any device: the interface that a file and pinned host memory share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Stored:
    """A tensor that lies elsewhere.

    Attributes:
        tensor: has the shape, strides, dtype and device of the original, and may be used in its place: it takes no
            device memory, and is slow to read.
        source: what a store brings in from, `tensor` itself where there is no difference.
    """

    tensor: Tensor
    source: Tensor


@dataclass(frozen=True)
class Arrival:
    """Weights on their way in.

    Attributes:
        tensors: the tensors to compute with, once :meth:`WeightStore.await_arrival` has returned.
        event: what the device must have reached before, None where there is nothing to wait for.
    """

    tensors: tuple[Tensor, ...]
    event: object = None


class WeightStore(ABC):
    """Keeps weights outside of device memory and brings them in for the time of a block."""

    where: str  # for people

    @abstractmethod
    def check_room(self, nbytes: int) -> None:
        """Makes sure that so many bytes will fit, as far as it can be known.

        Raises:
            OptionError: (a ``ValueError``) they will not.
        """

    @abstractmethod
    def put(self, tensor: Tensor) -> Stored:
        """Copies a tensor here; the original may go afterwards.

        Raises:
            OptionError: (a ``ValueError``) there is no room.
        """

    @abstractmethod
    def take_back(self, stored: Stored) -> Tensor:
        """Returns a copy in ordinary device memory."""

    @abstractmethod
    def discard(self, tensor: Tensor) -> None:
        """Frees the memory of an original that was put here and that nobody uses any more, as far as it can be told."""

    @abstractmethod
    def settle(self) -> None:
        """Gives freed memory back to the system."""

    @abstractmethod
    def start(self, weights: Sequence[Stored]) -> Arrival:
        """Begins to bring weights in; returns before they have arrived."""

    @abstractmethod
    def await_arrival(self, arrival: Arrival) -> None:
        """Makes what is called from here on run behind the arrival."""

    @abstractmethod
    def release(self, weights: Sequence[Stored]) -> None:
        """Lets weights go that were brought in and have been used."""

    @abstractmethod
    def memory(self) -> int:
        """Returns the bytes in use, of the process (CPU) or on the device."""

    @abstractmethod
    def peak(self) -> int:
        """Returns the largest value that :meth:`memory` had so far."""
