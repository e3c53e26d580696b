"""What a process holds in memory, by what Linux says in /proc: resident, its share of it, and what files back.

rss         pages in memory, those that other processes have too counted in full
pss         the same, each page divided by the number of processes that have it
anonymous   of rss, what no file backs: memory of the process's own, copies included
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

FIELDS = {"Rss:": "rss", "Pss:": "pss", "Anonymous:": "anonymous"}


def of_process() -> dict[str, int]:
    """Return bytes by the names above; raise an OSError where the system has no /proc."""
    return _sum(Path("/proc/self/smaps_rollup").read_text().splitlines())


def of_file(file: str | os.PathLike[str]) -> dict[str, int]:
    """Return bytes of the mappings of a file by the names above, zeros for a file that is not mapped."""
    name, inside, lines = str(Path(file).resolve()), False, []
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        field = line.split(maxsplit=1)[0]
        if not field.endswith(":"):  # the head of a mapping: addresses, permissions, ..., path
            inside = line.endswith(f" {name}")
        elif inside:
            lines.append(line)
    return _sum(lines)


class Peak:
    """Inside a with statement, watches `anonymous`: `bytes` is the most at one time."""

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


def _sum(lines: list[str]) -> dict[str, int]:
    found = dict.fromkeys(FIELDS.values(), 0)
    for line in lines:
        field, _, rest = line.partition(" ")
        if field in FIELDS:
            found[FIELDS[field]] += int(rest.split()[0]) * 1024
    return found
