"""Decides whether the span after an exit check starts before the check's result is known.

Waiting for the result leaves the device idle for the length of a round trip. Starting the next span meanwhile hides
that, and wastes the span where the token leaves. With p the chance of leaving, starting early pays where

    (1 - p) * round trip  >  p * seconds of the next span

p comes from the recent tokens at this depth, the two times from measurements of this run.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

_MEMORY = 0.95  # weight that an older observation keeps at each new one: about 20 tokens count


@dataclass
class LaunchAhead:
    """Learns from every check and answers for the next.

    Attributes:
        always: True or False to answer the same every time, None to decide by measurement.
        left: by depth, the share of recent tokens that left there.
    """

    always: bool | None = None
    left: dict[int, float] = field(default_factory=lambda: defaultdict(lambda: 0.5))
    _round_trip: float | None = None
    _span: dict[int, float] = field(default_factory=dict)

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


def _mix(old: float | None, new: float) -> float:
    return new if old is None else _MEMORY * old + (1 - _MEMORY) * new
