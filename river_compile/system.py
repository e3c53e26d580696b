"""Memory and files as the operating system has them: sizes, resident pages, bandwidth.

Not handled: resident memory on other systems than Linux, for which the process's peak stands; giving pages back there.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, UntypedStorage

from river_compile.kernels.native.machine import last_level_cache
from river_compile.upstream.tensors import parts_of

_PIECE = 1 << 20  # bytes
# Linux. DONTNEED takes pages out of the process and leaves them in the system's cache; on a private mapping it undoes
# changes. PAGEOUT (5.4) changes no content, but empties the cache, so the next process reads the disk.
MADV_DONTNEED, MADV_PAGEOUT = 4, 21
# Bits of an entry of /proc/self/pagemap.
_SWAPPED, _OF_A_FILE = 1 << 62, 1 << 61
_LEAST_READ = 256 << 20  # bytes in all, of which each read takes so many:
_READS = 4 << 20, 16 << 20


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


def advise_pageout(tensors: Iterable[Tensor]) -> int:
    """Take the pages of tensors in mapped files out of the process; they stay readable. Return their bytes."""
    # A thread that writes to such a tensor at this moment may lose what it writes: weights must not change in a call.
    tensors = [*tensors]
    if sys.platform != "linux" or not tensors:
        return 0
    files, paged_out = _mapped_files(), 0
    with contextlib.ExitStack() as stack:
        pagemap = None
        with contextlib.suppress(OSError):
            pagemap = stack.enter_context(open("/proc/self/pagemap", "rb"))
        for part in (part for tensor in tensors for part in parts_of(tensor)):
            first, end = part.data_ptr(), part.data_ptr() + part.nbytes
            if any(start <= first and end <= stop for start, stop in files):
                paged_out += part.nbytes
                unchanged = pagemap is not None and _is_unchanged(pagemap, first, end)
                _madvise(first, end, MADV_DONTNEED if unchanged else MADV_PAGEOUT, inside=True)
    return paged_out


def _is_unchanged(pagemap: BinaryIO, first: int, end: int) -> bool:
    """Whether all pages of an address range in memory are those of a file."""
    pages = slice(first // mmap.PAGESIZE, -(-end // mmap.PAGESIZE))
    pagemap.seek(8 * pages.start)
    entries = torch.frombuffer(bytearray(pagemap.read(8 * (pages.stop - pages.start))), dtype=torch.int64)
    here = (entries < 0) | (entries & _SWAPPED != 0)  # (the highest bit is that of a present page)
    return len(entries) == pages.stop - pages.start and not bool((here & (entries & _OF_A_FILE == 0)).any())


def _mapped_files() -> list[tuple[int, int]]:
    """Return the address ranges of this process that map files."""
    files = []
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, device, inode, *path = line.split(maxsplit=5)
        if inode != "0" and path and device != "00:01":  # shared memory has no file to come back from
            start, stop = addresses.split("-")
            files.append((int(start, 16), int(stop, 16)))
    return files


def advise(storage: UntypedStorage, advice: int, inside: bool = False) -> None:
    """Advise Linux about pages of a page-aligned storage, or with `inside` of any storage's whole pages."""
    _madvise(storage.data_ptr(), storage.data_ptr() + storage.nbytes(), advice, inside)


def _madvise(start: int, end: int, advice: int, inside: bool) -> None:
    if inside:
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and sys.platform == "linux":
        # An error (such as an old kernel's) is ignored: only memory and time depend on the advice.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)


def memory_bytes() -> int:
    """Return the bytes of the machine's memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def bandwidth(repeats: int = 2) -> float:
    """Measure the memory's bandwidth in bytes per second, with all threads: the best of many short reads."""
    # A read of a fraction of a millisecond ends before the scheduler gives the core to another process: of a shorter
    # one threads' start is a larger part. Together they exceed the caches, so each read comes from memory.
    size, best = max(_LEAST_READ, 2 * (last_level_cache() or 0)), 0.0
    numbers = torch.ones(size >> 2, dtype=torch.int32)
    for whole, length in itertools.product((numbers, numbers.view(torch.float32)), _READS):
        for piece in whole.split(length >> 2) * repeats:
            start = time.perf_counter()
            piece.sum()
            best = max(best, piece.nbytes / (time.perf_counter() - start))
    return best
