"""Memory and files as the operating system has them, for offloading.

Not handled: resident memory on other systems than Linux, for which the process's peak stands.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_PIECE = 1 << 20  # bytes


def trim_heap() -> None:
    """Return unused memory of the allocator to the system, if it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def file_system(folder: Path) -> str:
    """Return the type of a folder's file system, empty if unknown."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return ""
    path = folder.resolve()
    inside = [(len(Path(point).parts), kind) for point, kind in mounts if path.is_relative_to(point)]
    return max(inside, key=lambda pair: pair[0], default=(0, ""))[1]


def reserve(descriptor: int, nbytes: int) -> None:
    """Give an empty file its size and its room on the disk; raise OSError if there is none."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        os.posix_fallocate(descriptor, 0, nbytes)
        return
    zeros = bytes(min(nbytes, _PIECE))
    for begin in range(0, nbytes, _PIECE):
        os.pwrite(descriptor, zeros[: nbytes - begin], begin)


def resident_bytes() -> int:
    """Return the bytes of this process in memory."""
    return _status("VmRSS") if sys.platform == "linux" else peak_bytes()


def peak_bytes() -> int:
    """Return the most bytes of this process in memory so far."""
    if sys.platform == "linux":  # getrusage counts what the parent used before it started this process
        return _status("VmHWM")
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _status(name: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
