"""Files and folders that appear complete or not at all and are made once, and the folder for what can be made again."""

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

_making_own = threading.Lock()
_own_folders: dict[Path, Path] = {}
_SUFFIX = "[a-z0-9_]" * 8  # that `tempfile` gives a name


def cache_folder() -> Path:
    """Returns ``$RIVER_COMPILE_HOME`` or ~/.cache/river_compile (not created here)."""
    return Path(os.environ.get("RIVER_COMPILE_HOME") or "~/.cache/river_compile").expanduser()


def in_cache(name: str, is_whole: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """Returns the cache folder's file of a name, made where it is not whole.

    Where the folder cannot be written, a folder of this process's own takes its place, with one warning.

    Args:
        name: relative to the folder.
        is_whole: tells whether a file, which may be missing, is what it must be.
        make: writes it.

    Raises:
        OSError: there is no place for temporary files either.
    """
    folder = cache_folder()
    try:
        if not is_whole(folder / name):
            make(folder / name)
    except OSError as error:
        folder = _own_folder(folder, error)
        if not is_whole(folder / name):
            make(folder / name)
    return folder / name


def _own_folder(instead_of: Path, error: OSError) -> Path:
    with _making_own:
        if instead_of not in _own_folders:
            folder = _own_folders[instead_of] = Path(tempfile.mkdtemp(prefix="river-compile-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            warnings.warn(
                f"the cache folder {instead_of} cannot be written ({error}): what is compiled lasts for this process "
                "alone; set RIVER_COMPILE_HOME to a folder that can be",
                stacklevel=4,
            )
        return _own_folders[instead_of]


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Gives a path on the same disk; the file or folder written there takes the target's place at the end.

    After an error nothing is left behind. A folder takes the place of an empty one at most.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield scratch / target.name
        os.replace(scratch / target.name, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def making(target: Path) -> Iterator[None]:
    """Lets one process and thread after another make a file or folder: look inside whether it is there by now.

    The lock is a file beside the target. The operating system ends it with the process that holds it; what a killed
    process left unfinished is removed by the next.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        for unfinished in target.parent.glob(f".{glob.escape(target.name)}.{_SUFFIX}"):
            shutil.rmtree(unfinished, ignore_errors=True)
        yield
