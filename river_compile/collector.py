"""Python's garbage collector of cycles, which stands still while a program is made or read.

Not handled: code in other threads that switches the collector on or off meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_caller_freezes = False


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, no collection begins by itself, in any thread; afterwards the collector is as it was."""
    # A trace and its graphs are a million objects that stay. The collections that their number sets off look at all
    # objects of torch and transformers, for 0.3 s each, and find next to nothing.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not _frozen():  # (a caller's frozen objects stay frozen)
                gc.freeze()  # what is new becomes old without a look at it: the next full collection finds its cycles
                gc.unfreeze()
            gc.enable()


def _frozen() -> bool:
    """Whether the caller has frozen objects, now or once: to count a million of them takes 50 ms each time."""
    global _caller_freezes
    _caller_freezes = _caller_freezes or gc.get_freeze_count() > 0
    return _caller_freezes
