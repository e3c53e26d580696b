"""Counts the generations that were to keep the plain text with drafts and ran without, and says why once."""

from __future__ import annotations

import warnings
from collections import Counter

from river_compile.errors import RiverWarning


class PlainCalls:
    """The calls of one model's ``generate`` that ran plainly.

    Attributes:
        reasons: how many for each reason, in the order in which they first came up.
    """

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()

    def count(self, model_name: str, reason: str, told: bool = False) -> None:
        """Counts a call; the first one for a reason is warned of, where nobody has `told` why."""
        self.reasons[reason] += 1
        if self.reasons[reason] == 1 and not told:
            warnings.warn(f"{model_name}.generate runs plainly here: {reason}", RiverWarning, stacklevel=3)
