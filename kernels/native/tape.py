"""Tapes: calls of the C++ operators, recorded once and replayed by one call.

While a thread records, the operators compute nothing: their outputs are made, and the phases that would fill them go on
the tape. A replay runs these on the threads of the pool, with no torch between them, on the memory that the tensors
had when they were recorded: whoever replays keeps the given ones where they are. The tape keeps what it made.

Not handled: other operators, which would run at once, on values that are not there yet; see `lowering.native`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

import torch


class Tape:
    """A tape, empty until :meth:`recording`."""

    def __init__(self) -> None:
        self._address = 0
        self._kept: list[object] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, the operators that this thread calls go on the tape, in the place of what was there.

        Raises:
            RuntimeError: the thread records already, perhaps this tape, which stays what it was.
        """
        address = torch.ops.river_native.record()
        self._drop()
        self._address = address
        try:
            yield
        finally:
            torch.ops.river_native.recorded()

    def keep(self, tensor: object) -> None:
        """Keeps a tensor that operators on the tape read and nobody else holds."""
        self._kept.append(tensor)

    def replay(self) -> None:
        """Runs what was recorded, with ``torch.get_num_threads()`` threads.

        Raises:
            RuntimeError: nothing was recorded.
        """
        torch.ops.river_native.replay(self._address)

    @property
    def phases(self) -> int:
        """The number of recorded phases: one or two for each call."""
        return torch.ops.river_native.tape_phases(self._address)

    @property
    def bytes(self) -> int:
        """Memory that the tape holds for arguments and workspaces, without the tensors that it made."""
        return torch.ops.river_native.tape_bytes(self._address)

    def _drop(self) -> None:
        address, self._address, self._kept = self._address, 0, []
        if address:
            torch.ops.river_native.drop(address)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # (torch is taken apart by then, and the system frees what is left)
            self._drop()
