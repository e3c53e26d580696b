"""Packing in the background: a thread makes twins, perhaps quick ones first, while the model answers without drafts.

Not handled: a lower priority on other systems than Linux; Ctrl-C between its matrices (it ends after the present one).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from river_compile.kernels.messages import with_id
from river_compile.progress import stage_reached, stage_shown, stages_told

log = logging.getLogger("river_compile.twins")
# Of a core that generation uses too, packing then gets a quarter (Linux weighs a step of niceness by 1.25).
_NICER = 5
_STAGE = "packing"
_POLL = 0.1  # seconds


_begun: weakref.WeakSet[Packing] = weakref.WeakSet()


@atexit.register
def _end_all() -> None:
    """Cancel what still runs after Ctrl-C ended the wait for threads: none may be in torch when Python exits."""
    for packing in [*_begun]:
        packing.cancel()
        packing.join()


class _Cancelled(BaseException):
    """Ends the thread. Not an Exception, which code on the way might catch."""


def _be_nice() -> None:
    """Give this thread, and threads that it starts, less of a core that generation uses too."""
    if sys.platform == "linux":
        here = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, here, min(os.getpriority(os.PRIO_PROCESS, here) + _NICER, 19))


class Packing:
    """Works in a separate thread, by stages that have progress."""

    def __init__(self, works: Sequence[Callable[[], None]], finishes_at_exit: bool) -> None:
        """Begin; `finishes_at_exit`: whether the interpreter waits for it, since a later process uses the result."""
        self.stage, self.share = _STAGE, 0.0  # the present stage, and how much of it is done
        self.seconds = 0.0
        self.finishes_at_exit = finishes_at_exit
        self._error: Exception | None = None
        self._begun = self._done = False  # whether the first work has ended, and all that callers wait for
        self._next: list[Callable[[], None]] | None = [*works]  # None: no more is taken
        self._awaited = len(works)
        self._lock = threading.Lock()
        self._cancelled = self._told_of_exit = False
        self._thread = threading.Thread(target=self._run, name="river packing")
        self._thread.start()
        _begun.add(self)

    @property
    def usable(self) -> bool:
        """Whether the first work has ended, with a result or an error."""
        return self._begun

    @property
    def over(self) -> bool:
        """Whether the awaited works have ended or never will: a forked process misses the thread."""
        return self._done or self.idle

    @property
    def idle(self) -> bool:
        """Whether the works that no caller waits for have ended too."""
        return not self._thread.is_alive()

    def then(self, work: Callable[[], None]) -> bool:
        """Do more work afterwards, which `wait` does not wait for; return False if the thread has ended."""
        with self._lock:
            if self._next is None or self.idle:
                return False
            self._next.append(work)
        return True

    def check(self) -> None:
        """Raise the error that ended an awaited work, if one did."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Wait for the end, with a progress bar."""
        if self.over:
            return
        with stage_shown(_STAGE):
            while not self.over:
                with stage_shown(stage := self.stage):
                    while self.stage == stage and not self.over:
                        self._thread.join(_POLL)
                        stage_reached(self.share)

    def join(self) -> None:
        """Wait until all work has ended."""
        self._thread.join()

    def cancel(self) -> None:
        """End after the present matrix."""
        self._cancelled = True

    def _run(self) -> None:
        start = time.perf_counter()
        with stages_told(_STAGE, self._reach):
            while (work := self._taken()) is not None:
                if self._awaited == 1:  # a quick one before it, which makes the model faster, takes its whole share
                    _be_nice()
                self._do(work)
                self._begun = True
                self._awaited -= 1
                if not self._done:
                    self.seconds = time.perf_counter() - start
                    self._done = self._awaited == 0 or self._error is not None

    def _taken(self) -> Callable[[], None] | None:
        with self._lock:
            if self._next and self._error is not None:
                del self._next[: max(0, self._awaited)]
            if self._next:
                return self._next.pop(0)
            self._next = None
            return None

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except _Cancelled:
            pass
        except Exception as error:
            if self._done:
                why = f"{type(error).__name__}: {error}"
                log.warning("%s", with_id("RC050", f"Could not pack the 16-bit layers for later processes ({why})"))
            else:
                self._error = error  # raised where the twins are asked for

    def _reach(self, stage: str, share: float) -> None:
        self.stage, self.share = stage, share
        exits = not threading.main_thread().is_alive()
        if self._cancelled or (exits and not self.finishes_at_exit):
            raise _Cancelled
        if exits and not self._told_of_exit:
            self._told_of_exit = True
            message = "river: the twins are packed for later processes before this one ends; Ctrl-C skips it"
            print(message, file=sys.stderr, flush=True)


class Background:
    """What is made in the background for one model: its twins, and then the file of its 12-bit weights."""

    def __init__(self) -> None:
        self.enabled = False  # whether twins that only drafts read are made while the model answers without them
        self.packing: Packing | None = None  # the latest making of twins
        self._unwritten: Callable[[], None] | None = None  # writes the file, after the twins
        self._writing: Packing | None = None  # that does so

    @property
    def share(self) -> float | None:
        """How much of the twins' present stage is done; None if nothing runs."""
        return None if self.packing is None or self.packing.over else self.packing.share

    @property
    def usable(self) -> Packing | None:
        """The latest making of twins, if its first ones are there."""
        return self.packing if self.packing is not None and self.packing.usable else None

    @property
    def refines(self) -> bool:
        """Whether drafts run with quick twins, and better ones are being made."""
        return self.usable is not None and not self.usable.over

    @property
    def writes(self) -> bool:
        """Whether the file is being written now."""
        return self.share is None and self._writing is not None and not self._writing.idle

    @property
    def seconds(self) -> float:
        return 0.0 if self.packing is None else self.packing.seconds

    def begin(self, works: Sequence[Callable[[], None]], finishes_at_exit: bool) -> None:
        """Make twins, unless others are being made; drafts begin after the first work."""
        if self.packing is not None and not self.packing.over:
            if not self.packing.usable:
                return
            self.packing.cancel()  # its drafts are of parameters that are gone
        self.packing = Packing(works, finishes_at_exit)

    def end(self, cancel: bool) -> None:
        """Wait for twins that are being made, which `cancel` ends before."""
        if self.packing is not None:
            if cancel:
                self.packing.cancel()
            self.packing.wait()

    def write(self, work: Callable[[], None], now: bool) -> None:
        """Write the file once, after the twins: `now`, if they are there or begun, or with `begin_writing`."""
        if self._writing is None:
            self._unwritten = work
        if now or self.packing is not None:
            self.begin_writing()

    def begin_writing(self) -> None:
        """Begin the writing that waits for the twins."""
        work, self._unwritten = self._unwritten, None
        if work is None:
            return
        if self.packing is not None and self.packing.then(work):
            self._writing = self.packing
        else:
            self._writing = Packing([work], finishes_at_exit=True)
