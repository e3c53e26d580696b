"""One progress bar for the stages of a start: tracing, quantizing, compiling. Concurrent starts share it.

Without a terminal, as in a log file, a start that takes longer writes a line every ten seconds.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

_EVERY = 10.0  # seconds
_lock = threading.Lock()
_stages: list[str] = []  # running, outermost first
_bars: list[tqdm] = []  # the bar, while a stage goes on
_lines = [0.0, 0.0]  # when the start began, and when its last line was written


@contextlib.contextmanager
def stage_shown(name: str) -> Iterator[None]:
    """Inside, a stage runs; the bar shows the innermost stage."""
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


def stage_reached(share: float) -> None:
    """Set the progress of the innermost stage, from 0 to 1."""
    with _lock:
        if not _bars:
            return
        _bars[0].update(share - _bars[0].n)
        began, written = _lines
        now = time.monotonic()
        if _bars[0].disable and now - written >= _EVERY:
            print(f"river: {_stages[-1]}, {share:.0%} after {now - began:.0f} s", file=sys.stderr, flush=True)
            _lines[1] = now
