"""The compile cache: a folder of what earlier processes built, with one entry for each model or set of weights.

    $RIVER_COMPILE_CACHE_DIR/<key>/<name>    a file: the SHA-256 of its key, name and content in 64 digits, the content
                             <key>/<name>.block    a file that is mapped, and evicted by itself; it states its hash

Not handled: a parent folder that other users may write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from river_compile.errors import RiverWarning
from river_compile.kernels.files import atomic_write, cache_folder
from river_compile.kernels.messages import with_id

log = logging.getLogger("river_compile.compile_cache")
_HASH = 64  # hexadecimal digits
_DEFAULT_GB = 20.0
_VARIABLE = "RIVER_COMPILE_CACHE_DIR"
_ABOUT = "about"
PROMPTS = "prompts-"  # beginning of the keys of entries that hold what users wrote
BLOCK = ".block"  # ending of files that are used and evicted one by one; others go with their entry
_OF_BLOCKS = 0.25  # of the limit: what blocks may take in a full cache, since other entries take longer to build
_FOLDER, _FILE = 0o700, 0o600  # modes
_warned: set[str] = set()  # paths


def is_enabled() -> bool:
    """True if the environment allows a compile cache and no other user may write to it."""
    return os.environ.get(_VARIABLE) != "0" and is_trusted(compile_cache_folder())


def is_trusted(path: Path) -> bool:
    """True if a path is missing or no other user can have written it; otherwise warn once."""
    try:
        found = path.stat()
    except OSError:
        return True
    own, mode = found.st_uid == os.geteuid(), found.st_mode & 0o777
    if own and not mode & 0o022:
        return True
    if str(path) not in _warned:
        _warned.add(str(path))
        why = f"others may write to it (mode {mode:04o})" if own else f"it belongs to another user ({found.st_uid})"
        fix = f"Run chmod -R go-w {compile_cache_folder()}, or set" if own else "Set"
        message = f"The compile cache ignores {path}: {why}. {fix} RIVER_COMPILE_HOME to a folder of your own"
        warnings.warn(with_id("RC102", message), RiverWarning, stacklevel=4)
    return False


def compile_cache_folder() -> Path:
    """Return the folder of all entries (not created here)."""
    value = os.environ.get(_VARIABLE, "")
    return cache_folder() / "compile_cache" if value in ("", "0", "1") else Path(value).expanduser()


class Entry:
    """One entry: its folder, which may be missing, and a description for users."""

    def __init__(self, key: str, about: str = "") -> None:
        self.folder = compile_cache_folder() / key
        self._about = about

    def names(self, ending: str) -> list[str]:
        """Return the names of its files with an ending, sorted."""
        if not is_trusted(self.folder):
            return []
        try:
            return sorted(file.name for file in self.folder.glob(f"*{ending}"))
        except OSError:
            return []

    def read(self, name: str) -> bytes | None:
        """Return a file's content, None if it is missing, damaged or not trusted."""
        if not self.trusts(name):
            return None
        try:
            whole = (self.folder / name).read_bytes()
        except OSError:
            return None
        content = whole[_HASH:]
        if self._hash(name, content) != whole[:_HASH]:
            self.remove_damaged(name, "its place and content do not have the hash that it begins with")
            return None
        return content

    def trusts(self, name: str) -> bool:
        """True if no other user can have written a file; otherwise warn once."""
        return is_trusted(self.folder) and is_trusted(self.folder / name)

    def remove_damaged(self, name: str, why: object) -> None:
        """Remove a file that cannot be used, with a warning."""
        message = f"The cached file {self.folder / name} is damaged and is rebuilt: {why}"
        warnings.warn(with_id("RC103", message), RiverWarning, stacklevel=3)
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            log.info("%s: cannot be removed (%s)", self.folder / name, error)

    def write(self, name: str, content: bytes) -> None:
        """Write a file unless it exists; warn once in a process if it cannot."""
        whole = self._hash(name, content) + content
        self.write_by(name, lambda scratch: scratch.write_bytes(whole))

    def write_by(self, name: str, make: Callable[[Path], object]) -> None:
        """Have `make` write a file at a new path, unless it exists; warn once in a process if it cannot."""
        file = self.folder / name
        try:
            if file.exists():
                return
            self.make_folder()
            with atomic_write(file) as scratch:
                make(scratch)
                scratch.chmod(_FILE)
            self.describe()
        except OSError as error:
            warn_not_writable(error)

    def _hash(self, name: str, content: bytes) -> bytes:
        """Return the hash of a file, which another entry's file under this name does not have."""
        return hashlib.sha256(f"{self.folder.name}/{name}\n".encode() + content).hexdigest().encode()

    def make_folder(self) -> None:
        """Make its folder, for this user alone; raise an OSError if it cannot."""
        compile_cache_folder().mkdir(_FOLDER, parents=True, exist_ok=True)
        self.folder.mkdir(_FOLDER, exist_ok=True)

    def describe(self) -> None:
        if self._about and not (self.folder / _ABOUT).exists():
            (self.folder / _ABOUT).write_text(self._about, encoding="utf-8")
            (self.folder / _ABOUT).chmod(_FILE)

    def touch(self) -> None:
        """Mark it as used now."""
        try:
            os.utime(self.folder)
        except OSError:
            log.debug("%s cannot be marked as used", self.folder)


def warn_not_writable(error: object) -> None:
    """Warn, once in a process, about a compile cache that cannot be written."""
    folder = str(compile_cache_folder())
    if folder not in _warned:
        _warned.add(folder)
        warnings.warn(
            with_id(
                "RC104",
                f"Cannot write the compile cache {folder} ({error}), so the next process builds this model again. Set "
                "RIVER_COMPILE_HOME to a writable folder, or RIVER_COMPILE_CACHE_DIR=0",
            ),
            RiverWarning,
            stacklevel=4,
        )


class EntryInfo(NamedTuple):
    about: str
    folder: Path
    bytes: int
    used: float  # seconds since the epoch


def list_entries() -> Iterator[EntryInfo]:
    """Yield all entries, the most recently used first."""
    try:
        folders = [folder for folder in compile_cache_folder().iterdir() if folder.is_dir()]
    except OSError:
        return
    found = []
    for folder in folders:
        with contextlib.suppress(OSError):  # another process removes a file
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            found.append(EntryInfo(_read_about(folder), folder, size, folder.stat().st_mtime))
    yield from sorted(found, key=lambda entry: -entry.used)


def _read_about(folder: Path) -> str:
    try:
        return (folder / _ABOUT).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return folder.name


def clear(beginning: str = "") -> int:
    """Remove all entries whose keys have this beginning; return their bytes. Raises an OSError if one stays."""
    freed = 0
    for entry in list_entries():
        if not entry.folder.name.startswith(beginning):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process removes it, too
            shutil.rmtree(entry.folder)
        freed += entry.bytes
    return freed


def evict() -> None:
    """Remove the least recently used until the rest takes at most RIVER_COMPILE_CACHE_SIZE_GB.

    Blocks take what other entries leave of it, or a quarter; then whole entries go.
    """
    limit = float(os.environ.get("RIVER_COMPILE_CACHE_SIZE_GB") or _DEFAULT_GB) * 1e9
    entries = [_Used(entry.folder, entry.bytes, entry.used) for entry in list_entries()]
    blocks = [block for entry in entries for block in _blocks_of(entry.path)]
    of_blocks = Counter[Path]()
    for block in blocks:
        of_blocks[block.path.parent] += block.bytes
    others = [entry._replace(bytes=entry.bytes - of_blocks[entry.path]) for entry in entries]
    left = limit - sum(entry.bytes for entry in others)
    left = limit - _evict(blocks, max(left, _OF_BLOCKS * limit))
    _evict(others, left)


class _Used(NamedTuple):
    path: Path
    bytes: int
    used: float  # seconds since the epoch


def _blocks_of(folder: Path) -> Iterator[_Used]:
    for path in folder.glob(f"*{BLOCK}"):
        with contextlib.suppress(OSError):  # another process removes it
            found = path.stat()
            yield _Used(path, found.st_size, found.st_mtime)


def _evict(found: Iterable[_Used], limit: float) -> int:
    """Remove the least recently used beyond a limit; return the bytes that stay."""
    size = kept = 0
    for one in sorted(found, key=lambda one: -one.used):
        size += one.bytes
        if size <= limit:
            kept = size
            continue
        log.info("%s is evicted (%.1f MB)", one.path, one.bytes / 1e6)
        if one.path.name.endswith(BLOCK):
            with contextlib.suppress(OSError):
                one.path.unlink()
        else:
            shutil.rmtree(one.path, ignore_errors=True)
    return kept
