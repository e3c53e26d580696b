"""Launches a span before it is known whether the token stays at the check before it.

A device that runs late is idle while the host reads a score. The next span may run meanwhile: in vain where the token
leaves, and then its counters are taken back before the twins run. By default each check decides by itself, from how
many tokens left there and from times that are measured where nothing was launched ahead.

Not handled: blocks that change more than a counter and entries at counted positions, which are never launched ahead
(the log says why).
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

from river_compile.capture.device import CaptureLog
from river_compile.capture.runner import CapturedRunner
from river_compile.capture.units import CaptureUnit, Partition
from river_compile.passes.capture_safety import runs_once
from river_compile.passes.program import DecoderPlan
from river_compile.runtime.slots import Slots

_MEMORY = 0.95  # weight that an older observation keeps at each new one: about 20 tokens count


@dataclass
class LaunchAhead:
    """Learns from every check and decides at the next; one runner's alone."""

    always: bool | None = None  # True or False to answer the same every time, None to decide by measurement
    # by depth, the share of recent tokens that left there
    left: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: 0.5))
    _round_trip: float | None = None
    _span: dict[int, float] = field(default_factory=dict)
    # Of the step that runs: the check that was read last, and the unit after it that was launched ahead.
    _checked: int | None = None
    _launched: CaptureUnit | None = None

    def pays(self, depth: int, next_depth: int) -> bool:
        """Says whether to launch the span that ends at `next_depth` before the check after `depth` is read.

        False until both times are known: a wait that is not hidden is what measures them.
        """
        if self.always is not None:
            return self.always
        if self._round_trip is None or next_depth not in self._span:
            return False
        left = self.left[depth]
        return (1 - left) * self._round_trip > left * self._span[next_depth]

    def saw(self, depth: int, left: bool) -> None:
        """Notes whether a token left at a depth."""
        self.left[depth] = _mix(self.left[depth], left)

    def timed(self, depth: int, span: float, waited: float) -> None:
        """Notes the device's seconds for the span that ends at `depth`, and the host's from its launch to the flag."""
        self._span[depth] = _mix(self._span.get(depth), span)
        self._round_trip = _mix(self._round_trip, max(waited - span, 0.0))

    def begin(self) -> None:
        """Begins a step."""
        self._checked = self._launched = None

    def ask(self, runner: CapturedRunner, unit: CaptureUnit, slots: Slots) -> None:
        """Launches a span that ends with a check, unless that was done before, and waits for its score.

        Before it waits it launches the next span, if that pays.
        """
        self._verdict(left=False)
        device, launcher, depth = runner.device, runner.launcher, unit.end
        started: tuple[float, object] | None = None  # by the clocks of host and device, where a replay starts now
        if unit is self._launched:
            self._launched = None
        else:
            now = (time.perf_counter(), device.mark())
            started = now if launcher.launch(unit, slots) else None
        sent, following = device.mark(), runner.units.after(depth)
        allowed = following.name not in launcher.log.never_launched_ahead
        if allowed and self.pays(depth, following.end) and launcher.is_captured(following, slots):
            launcher.launch(following, slots)
            self._launched = following
        device.wait(sent)
        if started is not None and self._launched is None:  # a wait that nothing hid
            seconds = device.seconds_between(started[1], sent)
            if seconds is not None:
                self.timed(depth, seconds, time.perf_counter() - started[0])
        self._checked = depth

    def has(self, unit: CaptureUnit) -> bool:
        """Whether a unit, which the token has come to, is launched already. The token stayed then."""
        self._verdict(left=False)
        launched, self._launched = self._launched, None
        assert launched in (None, unit)
        return launched is not None

    def take_back(self, runner: CapturedRunner, slots: Slots) -> None:
        """The token leaves: takes back what was launched in vain, which ran for it too, as its twins will."""
        self._verdict(left=True)
        launched, self._launched = self._launched, None
        if launched is not None:
            runner.rewind(slots, launched.start, launched.end)

    def _verdict(self, left: bool) -> None:
        """Notes the decision at the check that was read last."""
        if self._checked is not None:
            self.saw(self._checked, left)
            self._checked = None


def note_order(plan: DecoderPlan, units: Partition, log: CaptureLog) -> None:
    """Writes down which spans cannot be launched ahead, and why."""
    for start, end in zip(units.ends, units.ends[1:], strict=False):
        reason = next(filter(None, (runs_once(plan, block) for block in plan.blocks[start:end])), None)
        if reason is not None:
            log.never_launched_ahead[units.after(start).name] = str(reason)


def _mix(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1 - _MEMORY) * new
