"""One progress bar for the stages of a start: tracing, quantizing, compiling. Concurrent starts share it.

Without a terminal, as in a log file, a start that takes longer writes a line every ten seconds.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

_EVERY = 10.0  # seconds
_lock = threading.Lock()


class _Shown:
    """The bar of the stages that run in the process."""

    def __init__(self) -> None:
        self.stages: list[str] = []  # running, outermost first
        self.bar: tqdm | None = None  # while a stage runs
        self.began = self.written = 0.0  # when the start began, and when its last line was written

    def begin(self, stage: str) -> None:
        self.stages.append(stage)
        if self.bar is None:
            form = "river: {desc} {percentage:3.0f}%|{bar:30}| {elapsed}"
            self.bar = tqdm(total=1.0, bar_format=form, leave=False, disable=None)
            self.began = self.written = time.monotonic()
        self.show(self.bar)

    def end(self, stage: str) -> None:
        self.stages.remove(stage)
        if self.bar is not None and self.stages:
            self.show(self.bar)
        elif self.bar is not None:
            self.bar.close()
            self.bar = None

    def show(self, bar: tqdm) -> None:
        bar.n = 0
        bar.set_description_str(self.stages[-1])

    def reach(self, share: float, part: str) -> None:
        if self.bar is None:
            return
        name = f"{self.stages[-1]} {part}".rstrip()
        self.bar.set_description_str(name, refresh=False)
        self.bar.update(share - self.bar.n)
        now = time.monotonic()
        if self.bar.disable and now - self.written >= _EVERY:
            reached = f", {share:.0%}" if share else ""
            print(f"river: {name}{reached} after {now - self.began:.0f} s", file=sys.stderr, flush=True)
            self.written = now


_shown = _Shown()


class _Told(threading.local):
    """A thread whose stages go to a function, in place of the bar."""

    tell: Callable[[str, float], None] | None = None
    stages: tuple[str, ...] = ()


_told = _Told()


@contextlib.contextmanager
def stages_told(first: str, tell: Callable[[str, float], None]) -> Iterator[None]:
    """Inside, call `tell(stage, share)` with this thread's progress, in a stage called `first`, and show nothing."""
    _told.tell, _told.stages = tell, (first,)
    try:
        yield
    finally:
        _told.tell = None


@contextlib.contextmanager
def stage_shown(name: str) -> Iterator[None]:
    """Inside, a stage runs; the bar shows the innermost stage."""
    if _told.tell is not None:
        outer, _told.stages = _told.stages, (*_told.stages, name)
        try:
            yield
        finally:
            _told.stages = outer
        return
    with _lock:
        _shown.begin(name)
    try:
        yield
    finally:
        with _lock:
            _shown.end(name)


def stage_reached(share: float, part: str = "") -> None:
    """Set the progress of the innermost stage, from 0 to 1, and the part that begins."""
    if _told.tell is not None:
        _told.tell(_told.stages[-1], share)
        return
    with _lock:
        _shown.reach(share, part)
