"""Runs the units of one state: replays captures, captures what can be captured, and runs the rest.

Not handled: which units a step runs (`state.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from river_compile.kernels.messages import with_id
from river_compile.passes.program import Program
from river_compile.runtime.captures import (
    CaptureDevice,
    CaptureFailed,
    CaptureLog,
    CaptureRecord,
    buffer_like,
    copy_into,
)
from river_compile.runtime.units import Unit

log = logging.getLogger("river_compile.runtime.launcher")


class Launcher:
    """The slots of one state, the buffers of the values between its units, and its captures."""

    def __init__(
        self,
        program: Program,
        log: CaptureLog,
        slots: list[Any],
        device: CaptureDevice | None,  # None: units run uncaptured
        last_token: bool = False,  # the only one whose logits are read; requires device=None
        keeps_hidden: bool = False,
    ) -> None:
        self.slots, self.device = slots, device
        self._program, self._log, self._keeps_hidden = program, log, keeps_hidden
        self.hidden: Tensor | None = None  # the last hidden states of all tokens, where the slot has the last one's
        self._narrowed = program.last_token if last_token else None
        self.buffers: dict[int, Tensor] = {}  # of the values between units, by slot
        self._replays: dict[Unit, Callable[[], object]] = {}
        self._warm: set[Unit] = set()
        # Host float32 [L + 1]: the scores of exit checks, by depth, and of the head (at L).
        self.flags = torch.empty(0) if device is None else device.flags(program.num_blocks + 1)

    def begin(self) -> None:
        """Begin a step, before its first unit."""
        if self.device is not None:
            self.device.begin((*self.buffers.values(), self.flags))

    def end(self) -> None:
        """End a step, after its last unit."""
        if self.device is not None:
            self.device.end()

    def launch(self, units: Sequence[Unit]) -> None:
        """Replay units; capture those that can be captured now, and run the rest."""
        for unit in units:
            replay = self._replays.get(unit) or self._captured_or_run(unit)
            if replay is not None:
                replay()

    def _captured_or_run(self, unit: Unit) -> Callable[[], object] | None:
        """Return a unit's replay; None if the unit ran uncaptured."""
        device = self.device
        with torch._C._DisableAutocast():  # compiled code contains its casts
            if device is None:
                self._run_plainly(unit)
                return None
            replay = self._capture(unit, device) if self._may_capture(unit, device) else None
            if replay is None:
                self._run_into_buffers(unit, device)
            return replay

    def _may_capture(self, unit: Unit, device: CaptureDevice) -> bool:
        reasons = self._log.uncaptured_units
        if unit.obstacle is not None:
            reasons.setdefault(unit.name, str(unit.obstacle))
        if unit.name in reasons:
            return False
        return unit in self._warm or not device.needs_a_run

    def _capture(self, unit: Unit, device: CaptureDevice) -> Callable[[], object] | None:
        start = time.perf_counter()
        try:
            replay, size = device.capture(unit, self.slots, self.flags, self._buffer)
        except CaptureFailed as error:
            self._log.uncaptured_units[unit.name] = str(error)
            log.warning("%s", with_id("RC082", f"{unit.name} runs without a capture, so it is slower: {error}"))
            return None
        before, _ = self._program.keys
        rows = 0 if before is None else self.slots[before].shape[0]
        record = CaptureRecord(unit.name, unit.depth, rows, time.perf_counter() - start, size)
        log.info("captured %s: depth %d, batch %d, %.3f s, %d bytes", *vars(record).values())
        self._log.add(record)
        self._replays[unit] = replay
        return replay

    def _run_plainly(self, unit: Unit) -> None:
        if self._narrowed is None:
            unit.run(self.slots)
            return
        for step in unit.steps:
            if step.segment.depth > self._program.num_blocks:
                self._narrow()
            step(self.slots)

    def _narrow(self) -> None:
        """Narrow the last hidden state to the last token, and the token count to one."""
        last = self._narrowed
        assert last is not None
        hidden = self.slots[last.hidden]
        self.hidden = hidden if self._keeps_hidden else None
        self.slots[last.hidden] = hidden.narrow(last.axis, hidden.shape[last.axis] - 1, 1).contiguous()
        self.slots[last.size] = 1

    def _run_into_buffers(self, unit: Unit, device: CaptureDevice) -> None:
        """Run a unit uncaptured and copy its outputs into their buffers."""
        own = list(self.slots)
        device.wait()
        unit.run(own, self.flags)
        pairs = [(self._buffer(index, own[index]), own[index]) for index in unit.writes]
        device.run(lambda: copy_into(pairs))
        self._warm.add(unit)

    def _buffer(self, index: int, value: Any) -> Any:
        """Return a slot's buffer, made for a value like this one; for a number, itself."""
        if isinstance(value, Tensor) and index not in self.buffers:
            self.buffers[index] = buffer_like(value)
            self._log.buffer_bytes += self.buffers[index].nbytes
        self.slots[index] = self.buffers.get(index, value)
        return self.slots[index]
