"""Offloaded weights of a model on the CPU: files that are mapped into memory.

Each weight gets a file without a name, whose space is free again with the tensor or the process. Whoever reads the
tensor reads the file, through the page cache. Bringing in and letting go are advice to the kernel.

Not handled: a folder in memory (tmpfs), where files take the memory that they should free; a warning says so.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from river_compile.errors import OptionError, RiverWarning
from river_compile.offload.store import Arrival, Stored, WeightStore

_PAGEOUT = 21  # MADV_PAGEOUT of Linux 5.4; changes no content, unlike MADV_DONTNEED on a private mapping
_TMPFS = {"tmpfs", "ramfs"}


class MappedFiles(WeightStore):
    """The store of a model on the CPU. The default folder is TMPDIR, or /var/tmp: /tmp may lie in memory.

    Raises:
        OptionError: (a ``ValueError``) the folder does not exist or takes no files.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = Path(folder or os.environ.get("TMPDIR") or "/var/tmp")
        try:
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            raise OptionError(
                f"offload_dir={str(self._folder)!r} takes no files ({error.strerror}); name a folder on a disk"
            ) from error
        self.where = f"memory-mapped files in {self._folder}"

    def check_room(self, nbytes: int) -> None:
        """Makes sure that the folder can hold so many bytes, and warns if it lies in memory."""
        free = shutil.disk_usage(self._folder).free
        if nbytes > free:
            raise self._no_room(nbytes, free)
        if file_system(self._folder) in _TMPFS:
            warnings.warn(
                f"offload_dir={str(self._folder)!r} lies in memory itself (tmpfs), so nothing is gained; name a folder "
                "on a disk",
                RiverWarning,
                stacklevel=2,
            )

    def _no_room(self, nbytes: int, free: int) -> OptionError:
        return OptionError(
            f"offload_dir={str(self._folder)!r} has {free / 1e6:.1f} MB free, and the weights take "
            f"{nbytes / 1e6:.1f} MB; make room, or name another folder"
        )

    def put(self, tensor: Tensor) -> Stored:
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            try:
                # Reserved beforehand: a page that found no room later would end the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise self._no_room(tensor.nbytes, shutil.disk_usage(self._folder).free) from error
                raise
            mapping = mmap.mmap(file.fileno(), tensor.nbytes)
        flat = torch.frombuffer(mapping, dtype=tensor.dtype)  # holds the mapping
        stored = flat.as_strided(tensor.shape, tensor.stride())
        stored.copy_(tensor)
        done = Stored(stored, stored)
        self.release([done])
        return done

    def discard(self, tensor: Tensor) -> None:
        """Takes the pages of an original out of memory that is itself a mapped file, as after ``from_pretrained``."""
        _advise(tensor.untyped_storage(), _PAGEOUT, inside=True)

    def settle(self) -> None:
        trim_heap()

    def start(self, weights: Sequence[Stored]) -> Arrival:
        for stored in weights:
            _advise(stored.tensor.untyped_storage(), mmap.MADV_WILLNEED)
        return super().start(weights)  # a page that is missing is waited for when read

    def release(self, weights: Sequence[Stored]) -> None:
        for stored in weights:  # the mapping is shared: its content is in the file, or on its way there
            _advise(stored.tensor.untyped_storage(), mmap.MADV_DONTNEED)

    def memory(self) -> int:
        return _status("VmRSS")

    def peak(self) -> int:
        return _status("VmHWM")


def trim_heap() -> None:
    """Returns unused memory of the allocator to the system, if it is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def file_system(folder: Path) -> str:
    """Returns the type of the file system that a folder lies on, empty if the system does not report it."""
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    path = folder.resolve()
    found = [(Path(mount.split()[1]), mount.split()[2]) for mount in mounts]
    inside = [(len(point.parts), kind) for point, kind in found if path.is_relative_to(point)]
    return max(inside, key=lambda pair: pair[0], default=(0, ""))[1]


def _status(name: str) -> int:
    """Returns a size of this process in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))


def _advise(storage: torch.UntypedStorage, advice: int, inside: bool = False) -> None:
    """Advises the kernel about the pages of a storage: those wholly inside of it, or all (it begins with one then).

    Advice may be refused: nothing depends on it but memory and time.
    """
    page = mmap.PAGESIZE
    start, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    if inside:
        start, end = -(-start // page) * page, end // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)
