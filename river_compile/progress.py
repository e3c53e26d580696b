"""One progress bar for all that a model's start waits for: tracing, text of its own, packing, compiling.

How long a part takes is estimated from the model's size beforehand; what parts took that are done corrects the estimate
of those to come, which differs from machine to machine. The bar appears after a second. Where standard error is no
terminal, the log gets a line every ten seconds in its place.

Not handled: starts of one model in several threads at once, which share a bar.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from torch import nn
from tqdm import tqdm

log = logging.getLogger("river_compile")
_APPEARS = 1.0  # seconds
_REDRAWN = 0.25
_LOGGED = 10.0
_FACTORS = 1 / 4, 4.0  # by which a machine may differ from the one that estimates are from
_MATRIX = 2  # dimensions
_ALMOST = 0.97  # of a part that takes longer than was estimated


def estimate(model: nn.Module, quantizer: str) -> dict[str, float]:
    """Returns the seconds that the parts of a model's first start are likely to take, by its size.

    The factors are those of SmolLM2 on two cores of a Xeon with AVX-512 (docs/performance.md).
    """
    modules = sum(1 for _ in model.modules())
    matrices = [p.shape for p in model.parameters() if p.dim() >= _MATRIX]
    weights = sum(shape.numel() for shape in matrices)
    cubes = sum(shape[-1] ** 3 for shape in matrices)
    packing = weights * 1.3e-7 + cubes * 3.2e-11 if quantizer == "gptq" else weights * 5e-8
    return {
        "tracing": 0.045 * modules,
        "rewriting": 0.013 * modules,
        "reading own text": weights * 7e-8,
        "packing": packing,
        "compiling": 0.2,
    }


class StartProgress:
    """The progress of one model's start.

    Args:
        clock: returns seconds.

    Attributes:
        estimated: seconds by part, in order; parts that nobody estimated count for nothing beforehand.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.estimated: dict[str, float] = {}
        self._taken: dict[str, float] = {}  # by part that is done, or in which another one began
        self._parts: list[str] = []  # that go on, each within the one before it
        self._share: float | None = None  # done of the innermost
        self._since = self._began = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Says what the parts of a start are likely to take; those of an earlier one are forgotten."""
        with self._lock:
            self.estimated, self._taken = dict(seconds), {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, a part goes on. The first one shows the bar, and the last one takes it away."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave(name)

    def reached(self, share: float) -> None:
        """Says how much of the innermost part is done."""
        self._share = share

    @property
    def left(self) -> float:
        """The seconds that the rest of the start is likely to take."""
        with self._lock:
            done = {name: seconds for name, seconds in self._taken.items() if name not in self._parts}
            expected = sum(self.estimated.get(name, 0.0) for name in done)
            factor = min(max(sum(done.values()) / expected, _FACTORS[0]), _FACTORS[1]) if expected else 1.0
            left = sum(s for name, s in self.estimated.items() if name not in done and name not in self._parts) * factor
            if self._parts:
                name = self._parts[-1]
                here = self._taken.get(name, 0.0) + self._clock() - self._since
                if self._share:
                    left += here / self._share - here
                else:
                    whole = self.estimated.get(name, 0.0) * factor
                    left += max(whole - here, whole * (1 - _ALMOST))
            return left

    def _enter(self, name: str) -> None:
        with self._lock:
            self._pause()
            self._parts.append(name)
            first = len(self._parts) == 1
        if first:
            self._began, self._ended = self._since, threading.Event()
            threading.Thread(target=self._show, args=(self._ended,), daemon=True).start()

    def _leave(self, name: str) -> None:
        with self._lock:
            self._pause()
            self._parts.remove(name)
            last = not self._parts
        if last:
            self._ended.set()

    def _pause(self) -> None:
        """Counts the innermost part's seconds so far."""
        now = self._clock()
        if self._parts:
            name = self._parts[-1]
            self._taken[name] = self._taken.get(name, 0.0) + now - self._since
        self._since, self._share = now, None

    def _show(self, ended: threading.Event) -> None:
        if ended.wait(_APPEARS):
            return
        if not sys.stderr.isatty():
            while not ended.wait(_LOGGED - _APPEARS):
                log.info("river: %s", self._line())
            return
        form = "river: {desc} {percentage:3.0f}%|{bar:30}|{postfix}"
        with tqdm(total=1.0, bar_format=form, leave=False) as bar:
            while not ended.wait(_REDRAWN):
                left, gone = self.left, sum(self._taken.values()) + self._clock() - self._since
                bar.n = max(bar.n, gone / (gone + left))
                bar.set_description_str(self._name, refresh=False)
                bar.set_postfix_str(f" about {left:.0f} s left", refresh=True)

    @property
    def _name(self) -> str:
        parts = self._parts
        return parts[-1] if parts else ""

    def _line(self) -> str:
        return f"{self._name}, {self._clock() - self._began:.0f} s so far, about {self.left:.0f} s left"
