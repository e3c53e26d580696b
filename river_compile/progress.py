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
_stages: list[str] = []  # running, outermost first
_bars: list[tqdm] = []  # the bar, while a stage runs
_lines = [0.0, 0.0]  # when the start began, and when its last line was written


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
        _stages.append(name)
        if not _bars:
            form = "river: {desc} {percentage:3.0f}%|{bar:30}| {elapsed}"
            _bars.append(tqdm(total=1.0, bar_format=form, leave=False, disable=None))
            _lines[:] = [time.monotonic()] * 2
        _show()
    try:
        yield
    finally:
        with _lock:
            _stages.remove(name)
            _show() if _stages else _bars.pop().close()


def _show() -> None:
    _bars[0].n = 0
    _bars[0].set_description_str(_stages[-1])


def stage_reached(share: float, part: str = "") -> None:
    """Set the progress of the innermost stage, from 0 to 1, and the part that begins."""
    if _told.tell is not None:
        _told.tell(_told.stages[-1], share)
        return
    with _lock:
        if not _bars:
            return
        name = f"{_stages[-1]} {part}".rstrip()
        _bars[0].set_description_str(name, refresh=False)
        _bars[0].update(share - _bars[0].n)
        began, written = _lines
        now = time.monotonic()
        if _bars[0].disable and now - written >= _EVERY:
            print(f"river: {name}, {share:.0%} after {now - began:.0f} s", file=sys.stderr, flush=True)
            _lines[1] = now
