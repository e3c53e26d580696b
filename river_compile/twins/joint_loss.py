"""The joint loss of a model's latest twins, in memory and with their file in the compile cache.

Not handled: how it is estimated (:mod:`river_compile.twins.own_text`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from river_compile.compile_cache.folder import Entry
from river_compile.twins.making import Statistics
from river_compile.twins.own_text import TwinLoss
from river_compile.twins.weights import TwinWeight

_FILE = "loss.json"


class JointLoss:
    """What is known of the loss of a model's latest twins."""

    def __init__(self) -> None:
        self.value: TwinLoss | None = None  # None if not known
        self.is_old = False  # whether statistics made twins since
        self.entry: Entry | None = None  # of the latest twins in the compile cache

    def read(self, observes: bool) -> None:
        """Take the loss of twins that were read from the entry; `observes`: statistics made them."""
        assert self.entry is not None
        known = self.entry.read(_FILE)
        self.value = None if known is None else TwinLoss(**json.loads(known))
        self.is_old = observes and self.value is None

    def estimate(self, twins: Iterable[TwinWeight], statistics: Statistics) -> None:
        """Estimate the loss of a graph's twins, if statistics made some since the last time."""
        if not self.is_old:
            return
        self.value, self.is_old = statistics.own.loss(twins), False
        if self.entry is not None and self.value is not None and self.entry.folder.exists():
            self.entry.write(_FILE, json.dumps(asdict(self.value)).encode())
