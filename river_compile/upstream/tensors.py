"""Tensors and the installed versions as torch does not describe them: parts, changes, pages in memory; tested versions.

Not handled: fake tensors; giving memory back on other systems than Linux; which versions go together, which pip knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, UntypedStorage

from river_compile.errors import RiverWarning
from river_compile.kernels.messages import with_id
from river_compile.passes.nodes import is_ordinary

# Linux. DONTNEED takes pages out of the process and leaves them in the system's cache; on a private mapping it undoes
# changes. PAGEOUT (5.4) changes no content, but empties the cache, so the next process reads the disk.
MADV_DONTNEED, MADV_PAGEOUT = 4, 21
# Bits of an entry of /proc/self/pagemap.
_SWAPPED, _OF_A_FILE = 1 << 62, 1 << 61


def parts_of(tensor: Tensor) -> list[Tensor]:
    """Return the ordinary tensors that hold a tensor's data: itself, or the parts of a quantized one."""
    if is_ordinary(tensor):
        return [tensor]
    subclass: Any = tensor
    names, _ = subclass.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]


def as_ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor's values in its dtype, dequantized if it is quantized."""
    return tensor.detach() if is_ordinary(tensor) else tensor.dequantize().to(tensor.dtype)


def version_of(tensor: Tensor) -> int:
    """Return the number of in-place changes that PyTorch counted; it counts none of inference tensors."""
    return 0 if tensor.is_inference() else tensor._version


def local_of(tensor: Any) -> Any:
    """Return this rank's part of a DTensor, always the same tensor; other values unchanged."""
    return getattr(tensor, "_local_tensor", tensor)


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


class Tested(NamedTuple):
    oldest: str
    newest: str


PYTHON = "Python"
# Oldest and newest version that `make compat` runs, as in pyproject.toml; patch releases are not told apart.
TESTED = {
    PYTHON: Tested("3.10", "3.13"),
    "torch": Tested("2.11", "2.15"),
    "transformers": Tested("5.17", "5.24"),
    "triton": Tested("3.6", "3.9"),
}


def installed(name: str) -> str:
    """Return the version of Python or a distribution; raise `metadata.PackageNotFoundError` if missing."""
    return platform.python_version() if name == PYTHON else metadata.version(name)


def untested(find_version: Callable[[str], str] = installed) -> Iterator[str]:
    """Yield "torch 2.16.0 (tested: 2.11 to 2.15)" for each installed version outside of the tested range."""
    for name, (oldest, newest) in TESTED.items():
        try:
            version = find_version(name)
        except metadata.PackageNotFoundError:
            continue  # Triton, on machines without a GPU
        if not _numbers_of(oldest) <= _numbers_of(version) <= _numbers_of(newest):
            yield f"{name} {version} (tested: {oldest} to {newest})"


def warn_of_untested() -> None:
    """Warn about untested versions; the backend calls it on import, so once in a process."""
    found = ", ".join(untested())
    if found:
        warnings.warn(
            with_id("RC024", f"River was not tested with {found}. If something fails, install a tested version first"),
            RiverWarning,
            stacklevel=2,
        )


def _numbers_of(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
