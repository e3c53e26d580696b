"""One bar on a terminal for what a start waits for: tracing, packing, compiling. Two starts at once share it."""

import contextlib
import threading
from collections.abc import Iterator

from tqdm import tqdm

_lock = threading.Lock()
_stages: list[str] = []  # that go on, each within the one before it
_bars: list[tqdm] = []  # the bar, while a stage goes on


@contextlib.contextmanager
def stage_shown(name: str) -> Iterator[None]:
    """Inside, a stage of a start goes on; the bar shows the innermost."""
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
    """Says how much of the innermost stage is done."""
    for bar in _bars[:]:
        bar.update(share - bar.n)
