"""Atomic writes, locks between processes, and the cache folder."""

from __future__ import annotations

import atexit
import glob
import os
import shutil
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from river_compile.kernels.messages import with_id

_fallback_lock = threading.Lock()
_fallback_folders: dict[Path, Path] = {}
_SUFFIX = "[a-z0-9_]" * 8  # `tempfile` appends it to a prefix


def cache_folder() -> Path:
    """Return ``$RIVER_COMPILE_HOME`` or ~/.cache/river_compile (not created here)."""
    return Path(os.environ.get("RIVER_COMPILE_HOME") or "~/.cache/river_compile").expanduser()


def cached_file(name: str, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """Return the cache folder's file `name`, made unless `is_whole(path)`; raise OSError if no folder is writable."""
    folder = cache_folder()
    try:
        if not is_whole(folder / name):
            make(folder / name)
    except OSError as error:
        folder = _fallback_folder(folder, error)
        if not is_whole(folder / name):
            make(folder / name)
    return folder / name


def _fallback_folder(cache: Path, error: OSError) -> Path:
    """Return a temporary folder of this process, with one warning for each unwritable cache folder."""
    with _fallback_lock:
        if cache not in _fallback_folders:
            folder = _fallback_folders[cache] = Path(tempfile.mkdtemp(prefix="river-compile-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            warnings.warn(
                with_id(
                    "RC104",
                    f"Cannot write the cache folder {cache} ({error}). Compiled files last for this process only. "
                    "To keep them, set RIVER_COMPILE_HOME to a writable folder",
                ),
                stacklevel=4,
            )
        return _fallback_folders[cache]


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a scratch path for a file or folder that replaces `target` on success; a folder replaces no full one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))  # on the same disk
    try:
        yield scratch / target.name
        os.replace(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Lock a file or folder for one thread of one process; check inside whether it exists by now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # The operating system releases the lock of a killed process; the next holder removes its scratch folders.
    with FileLock(target.with_name(f".{target.name}.lock")):
        for unfinished in target.parent.glob(f".{glob.escape(target.name)}.{_SUFFIX}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield
