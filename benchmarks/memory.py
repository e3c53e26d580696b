"""The most private memory that a process held at a time, by what Linux says in /proc: pages that no file backs."""

from __future__ import annotations

import threading
from pathlib import Path


class Peak:
    """Inside a with statement, watches the process's own memory: `bytes` is the most at one time."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            status = Path("/proc/self/status").read_text().partition("RssAnon:")[2]
            self.bytes = max(self.bytes, int(status.split()[0]) * 1024)
            if self._ended.wait(0.02):
                return
