"""Memory of tensors that the system can take back, as it keeps it: a checkpoint's, which is mapped while it is loaded.

Not handled: other systems than Linux, where nothing is given back.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from river_compile.upstream.tensors import parts_of

_MADV_PAGEOUT = 21  # Linux 5.4: pages leave the process, and changed ones stay somewhere


def give_back(tensors: Iterable[Tensor]) -> int:
    """Asks the system to take the pages of tensors out of the process where these are a file's.

    Who reads them afterwards finds the same values, and waits for the pages: from the system's cache of files, or from
    disk.

    Returns:
        The number of bytes of tensors that lie in files.
    """
    tensors = [*tensors]
    if sys.platform != "linux" or not tensors:
        return 0
    files, given = _mapped_files(), 0
    libc = ctypes.CDLL(None)
    for part in (part for tensor in tensors for part in parts_of(tensor)):
        first, end = part.data_ptr(), part.data_ptr() + part.nbytes
        if not any(start <= first and end <= stop for start, stop in files):
            continue
        given += part.nbytes
        first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end:  # (an older kernel refuses, and the pages stay)
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)
    return given


def _mapped_files() -> list[tuple[int, int]]:
    """Returns the addresses of this process at which files lie."""
    files = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, device, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and device != "00:01":  # (shared memory has no file to come back from)
            start, stop = addresses.split("-")
            files.append((int(start, 16), int(stop, 16)))
    return files
