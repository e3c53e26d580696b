"""The thread of a continuous batch, and turns at the model: the thread's cycles, or a call that runs alone.

Not handled: what a cycle does (`batch_loop.py`); who calls (`continuous.py`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from river_compile.decoding.batch_loop import BatchLoop, Row, Submitted
from river_compile.errors import BatchError

log = logging.getLogger("river_compile.continuous")
CLOSED = "This ContinuousBatch was closed. Create another one"
ENDED = "The thread of this ContinuousBatch has ended. The log says why. Create another one"


class BatchThread:
    """Runs the cycles of a loop while there are rows. It holds no batch, so a batch that is dropped ends it."""

    def __init__(self, loop: BatchLoop, on_end: Callable[[], None]) -> None:
        self.loop, self._on_end = loop, on_end  # called when all rows were ended with an error
        self.busy_seconds = 0.0
        self.changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._alone = 0  # calls that run alone, or wait to
        self._user: threading.Thread | None = None  # of the model: this thread, or a call's
        self._closed = self._dropped = False
        self._dead: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="river continuous batch", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether rows are accepted."""
        return not self._closed and self._dead is None

    def check_alive(self) -> None:
        """Raise a BatchError if no rows are accepted."""
        if not self.alive:
            raise BatchError(CLOSED if self._closed else ENDED)

    @property
    def is_this_thread(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def is_used_here(self) -> bool:
        """Whether this thread uses the model alone."""
        return self._user is threading.current_thread()

    def add(self, row: Row) -> None:
        """Queue a row; raise a BatchError if none is accepted."""
        with self.changed:
            self.check_alive()
            self._waiting.append(row)
            self.changed.notify_all()

    def cancel(self, owner: Submitted) -> None:
        """End an owner's rows after the current cycle."""
        with self.changed:
            owner.cancelled = True
            self.changed.notify_all()

    def close(self) -> None:
        """End all rows with an error; return when the thread has ended."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        if not self.is_this_thread:
            self._thread.join()

    def drop(self) -> None:
        """End the thread when the last row has ended."""
        with self.changed:
            self._dropped = True
            self.changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the thread waits, and this one may use the model."""
        with self.changed:
            self._alone += 1
            while self._user is not None and not self._closed:
                self.changed.wait()
            self._user = threading.current_thread()
        try:
            yield
        finally:
            with self.changed:
                self._alone -= 1
                self._user = None
                self.changed.notify_all()

    def _run(self) -> None:
        try:
            while self._take_turn():
                self._cycle()
            if self._closed:
                self._end_all(BatchError(CLOSED))
        except BaseException as error:
            log.exception("the thread of a ContinuousBatch has died")
            self._dead = error
            self._end_all(error)
            raise

    def _take_turn(self) -> bool:
        """Wait for work and for the model; return False at the end of the thread."""
        with self.changed:
            while not self._closed:
                has_work = bool(self._waiting) or self.loop.has_work
                if has_work and not self._alone and self._user is None:
                    self._user = self._thread
                    return True
                if self._dropped and not has_work:
                    return False
                self.changed.wait()
        return False

    def _cycle(self) -> None:
        """Run a piece of a prompt and a cycle of the rows."""
        began = time.perf_counter()
        try:
            with torch.no_grad():
                self.loop.cycle(self._waiting)
        finally:
            with self.changed:
                self._user = None
                self.busy_seconds += time.perf_counter() - began
                self.changed.notify_all()

    def _end_all(self, error: BaseException) -> None:
        """End all rows with an error."""
        with self.changed:
            waiting = [*self._waiting]
            self._waiting.clear()
        self.loop.end_all(error)
        for row in waiting:
            row.result.set_exception(error)
        self._on_end()
