"""Python's garbage collector of cycles, which stands still while a program is made.

Not handled: code in other threads that switches the collector on or off meanwhile.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Inside, no collection begins by itself, in any thread; afterwards the collector is as it was."""
    # A trace and its graphs are a million objects that stay. The collections that their number sets off each look at
    # all objects of torch and transformers, which takes 0.3 s, and find nothing.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
