"""How long passes and draft steps take: measured, or estimated from other widths, other contexts and what they read.

Not handled: how the cost of a context grows within one text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

_SAMPLES = 9  # recent times per width, the least of which counts
_ENOUGH = 3  # times before their minimum is trusted
_STALE = 500  # cycles after which a width is measured again
_DRAFT_COSTS = 0.3  # a draft step's time in passes of one token, before it was measured
_WIDER_COSTS = 0.02  # what a pass costs more with each token beyond the first, at best, if it reads no more
_NOT_SHARED = 0.75  # of what a pass reads more than one token, at best: neighbors choose some experts together


class PassTimes:
    """Recent times of passes by width, and of draft steps by source, after contexts of about one size."""

    def __init__(self, near: PassTimes | None = None) -> None:
        self._near = near  # those of the nearest size that is known
        self._times: dict[int | str, deque[float]] = {}
        self._measured: dict[int | str, int] = {}  # the cycle of the latest time
        self._cycles = 0
        self._reads: Callable[[int], float] = _one

    def set_reads(self, reads: Callable[[int], float] | None) -> None:
        """Set the bytes of weights that a pass of a width reads, in those of one token; None: all read the same."""
        self._reads = reads or _one

    def end_cycle(self) -> None:
        self._cycles += 1

    def add(self, what: int | str, seconds: float) -> None:
        """Add one time of a pass of a width, or of a source's draft step."""
        if self._cycles - self._measured.get(what, self._cycles) > _STALE:
            del self._times[what]
        self._times.setdefault(what, deque(maxlen=_SAMPLES)).append(seconds)
        self._measured[what] = self._cycles

    def is_known(self, what: int | str) -> bool:
        """Whether there are enough times that are not old, or were after other contexts."""
        return self._is_measured(what) or (self._near is not None and self._near.is_known(what))

    def seconds(self, what: int | str) -> float:
        """Return the recent minimum, or an estimate."""
        times = self._times.get(what, ())
        if self._is_measured(what):
            return min(times)
        if self._near is not None and self._near.is_known(what):
            return min([*times, self._from_near(self._near, what)])
        # A width with few or old times costs at least its share of each known width. A higher estimate would
        # keep it from being tried again.
        known = {w: min(ts) for w, ts in self._times.items() if isinstance(w, int) and w != what and len(ts) >= _ENOUGH}
        if not known and self._near is not None:
            known = {1: self._from_near(self._near, 1)}
        at_best = max(seconds * self._share(what, w) for w, seconds in (known or {1: 1.0}).items())
        return min([*times, at_best])

    def _is_measured(self, what: int | str) -> bool:
        return len(self._times.get(what, ())) >= _ENOUGH and self._cycles - self._measured[what] <= _STALE

    def _from_near(self, near: PassTimes, what: int | str) -> float:
        """Return a time after other contexts, and what reading these takes more or less."""
        # Passes and draft steps read the whole cache once, whatever else they do.
        seconds = near.seconds(what)
        more = [min(ts) - near.seconds(w) for w, ts in self._times.items() if len(ts) > 1 and near.is_known(w)]
        return max(seconds + min(more, default=0.0), seconds / 2)

    def _share(self, what: int | str, known: int) -> float:
        """Return a lower bound of the cost of a pass or a draft step, relative to a pass of a known width."""
        # A wider pass costs little more if it waits for the same weights; a narrower one costs in proportion if it
        # computes.
        if isinstance(what, str):
            return _DRAFT_COSTS * self._share(1, known)
        return what / known if what < known else self._at_best(what) / self._at_best(known)

    def _at_best(self, width: int) -> float:
        return (1 + _WIDER_COSTS * (width - 1)) * (1 + _NOT_SHARED * (self._reads(width) - 1))


def _one(_width: int) -> float:
    return 1.0
