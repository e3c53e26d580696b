"""One progress bar for the stages of a start: tracing, quantizing, compiling. Concurrent starts share it."""

import contextlib
import threading
from collections.abc import Iterator

from tqdm import tqdm

_lock = threading.Lock()
_stages: list[str] = []  # running, outermost first
_bars: list[tqdm] = []  # the bar, while a stage goes on


@contextlib.contextmanager
def stage_shown(name: str) -> Iterator[None]:
    """Inside, a stage runs; the bar shows the innermost stage."""
    with _lock:
        _stages.append(name)
        if not _bars:
            form = "river: {desc} {percentage:3.0f}%|{bar:30}| {elapsed}"
            _bars.append(tqdm(total=1.0, bar_format=form, leave=False, disable=None))
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
    for bar in _bars[:]:
        bar.update(share - bar.n)
