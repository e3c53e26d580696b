"""The folder in which processes leave for the next ones what they built: one entry for each identity of a model.

    $RIVER_COMPILE_CACHE/store/<identity>/<name>    a file: its SHA-256 in 64 hexadecimal digits, then what was hashed

Files appear whole, and the first process to write one keeps it. What is damaged, cut or foreign is told once, and
removed. Entries that were not used for longest give way where all of them exceed the bound (`RIVER_COMPILE_STORE_GB`,
20 by default). ``RIVER_COMPILE_STORE=0`` does without the store; a folder there takes the place of the one above.

What others may have written is left alone, with a warning: folders are made 0700, files 0600. Not handled: a folder
above the store that others may write to.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from river_compile.errors import RiverWarning
from river_compile.kernels.files import atomic_write, cache_folder

log = logging.getLogger("river_compile.store")
_HASH = 64  # hexadecimal digits
_GB = 20.0
_VARIABLE = "RIVER_COMPILE_STORE"
_ABOUT = "about"
_FOLDER, _FILE = 0o700, 0o600  # modes
_told: set[str] = set()  # what was warned of


def enabled() -> bool:
    """Tells whether the environment allows a store, and nobody else may write to it."""
    return os.environ.get(_VARIABLE) != "0" and is_trusted(store_folder())


def is_trusted(path: Path) -> bool:
    """Tells whether nobody else can have written a file or folder, or none is there; warns once of another."""
    try:
        found = path.stat()
    except OSError:
        return True
    own, mode = found.st_uid == os.geteuid(), found.st_mode & 0o777
    if own and not mode & 0o022:
        return True
    if str(path) not in _told:
        _told.add(str(path))
        whose = f"others may write to it (mode {mode:04o})" if own else f"it is of another user (number {found.st_uid})"
        fix = f"run chmod -R go-w {store_folder()}, or set" if own else "set"
        warnings.warn(
            f"{path} is left alone: {whose}; {fix} RIVER_COMPILE_CACHE to a folder of yours", RiverWarning, stacklevel=4
        )
    return False


def store_folder() -> Path:
    """Returns the folder of all entries (not created here)."""
    said = os.environ.get(_VARIABLE, "")
    return cache_folder() / "store" if said in ("", "0", "1") else Path(said).expanduser()


class Entry:
    """What is stored for one identity.

    Args:
        identity: its name.
        about: what it is, for people.

    Attributes:
        folder: its folder, which may be missing.
    """

    def __init__(self, identity: str, about: str = "") -> None:
        self.folder = store_folder() / identity
        self._about = about

    def names(self, ending: str) -> list[str]:
        """Returns the names of its files with an ending, sorted."""
        if not is_trusted(self.folder):
            return []
        try:
            return sorted(file.name for file in self.folder.glob(f"*{ending}"))
        except OSError:
            return []

    def read(self, name: str) -> bytes | None:
        """Returns what a file holds, None where it is missing or damaged."""
        file = self.folder / name
        if not (is_trusted(self.folder) and is_trusted(file)):
            return None
        try:
            whole = file.read_bytes()
        except OSError:
            return None
        content = whole[_HASH:]
        if hashlib.sha256(content).hexdigest().encode() != whole[:_HASH]:
            self.damaged(name, "its hash differs from the one it begins with")
            return None
        return content

    def damaged(self, name: str, why: object) -> None:
        """Warns of a file that cannot be used, and removes it."""
        warnings.warn(f"{self.folder / name} is damaged and is made anew: {why}", RiverWarning, stacklevel=3)
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            log.info("%s: cannot be removed (%s)", self.folder / name, error)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file that is not there yet; a place that cannot be written is told once in a process."""
        file = self.folder / name
        try:
            if file.exists():
                return
            self.make()
            with atomic_write(file) as scratch:
                scratch.write_bytes(hashlib.sha256(content).hexdigest().encode() + content)
                scratch.chmod(_FILE)
            self.describe()
        except OSError as error:
            cannot_write(error)

    def make(self) -> None:
        """Makes its folder, for this user alone; raises an OSError where that cannot be."""
        store_folder().mkdir(_FOLDER, parents=True, exist_ok=True)
        self.folder.mkdir(_FOLDER, exist_ok=True)

    def describe(self) -> None:
        """Writes what it is, for people."""
        if self._about and not (self.folder / _ABOUT).exists():
            (self.folder / _ABOUT).write_text(self._about, encoding="utf-8")
            (self.folder / _ABOUT).chmod(_FILE)

    def used(self) -> None:
        """Notes that it was used now."""
        try:
            os.utime(self.folder)
        except OSError:
            log.debug("%s cannot be marked as used", self.folder)


def cannot_write(error: Exception) -> None:
    """Warns, once in a process, of a store that cannot be written."""
    folder = str(store_folder())
    if folder not in _told:
        _told.add(folder)
        warnings.warn(
            f"the store {folder} cannot be written ({error}): the next process builds this model again; set "
            "RIVER_COMPILE_CACHE to a folder that can be, or RIVER_COMPILE_STORE=0",
            RiverWarning,
            stacklevel=4,
        )


class Stored(NamedTuple):
    """One entry, for people: what it is, its folder, bytes, and when it was last used (seconds since the epoch)."""

    about: str
    folder: Path
    bytes: int
    used: float


def entries() -> Iterator[Stored]:
    """Yields all entries, the one that was used last first."""
    try:
        folders = [folder for folder in store_folder().iterdir() if folder.is_dir()]
        found = [
            Stored(_about(f), f, sum(x.stat().st_size for x in f.rglob("*") if x.is_file()), f.stat().st_mtime)
            for f in folders
        ]
    except OSError:
        return
    yield from sorted(found, key=lambda entry: -entry.used)


def _about(folder: Path) -> str:
    try:
        return (folder / _ABOUT).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return folder.name


def clear() -> int:
    """Removes all entries; returns their bytes."""
    freed = 0
    for entry in entries():
        shutil.rmtree(entry.folder, ignore_errors=True)
        freed += entry.bytes
    return freed


def keep_bound() -> None:
    """Removes the entries that were not used for longest, until the others keep the bound."""
    bound, held = float(os.environ.get("RIVER_COMPILE_STORE_GB") or _GB) * 1e9, 0
    for entry in entries():
        held += entry.bytes
        if held > bound:
            log.info("%s gives way (%.1f MB)", entry.folder, entry.bytes / 1e6)
            shutil.rmtree(entry.folder, ignore_errors=True)
