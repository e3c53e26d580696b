"""The versions that this release was tested with, and a warning about others. ``make compat`` runs the corners.

The floors are those of ``pyproject.toml``. A version counts by its first two numbers: patches and builds are not told
apart. Not handled: which versions go together, which pip knows.
"""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

from river_compile.errors import RiverWarning


class Tested(NamedTuple):
    """The oldest and the newest version that was tested, "3.10"."""

    oldest: str
    newest: str


PYTHON = "Python"
TESTED = {
    PYTHON: Tested("3.10", "3.13"),
    "torch": Tested("2.11", "2.15"),
    "transformers": Tested("5.17", "5.24"),
    "triton": Tested("3.6", "3.9"),
}


def installed(name: str) -> str:
    """Returns the version of Python or of a distribution.

    Raises:
        PackageNotFoundError: (of `importlib.metadata`) there is none.
    """
    return platform.python_version() if name == PYTHON else metadata.version(name)


def untested(version_of: Callable[[str], str] = installed) -> Iterator[str]:
    """Yields "torch 2.16.0 (tested: 2.11 to 2.15)" for each installed version outside."""
    for name, (oldest, newest) in TESTED.items():
        try:
            version = version_of(name)
        except metadata.PackageNotFoundError:
            continue  # (Triton, where there is no GPU for it)
        if not _numbers_of(oldest) <= _numbers_of(version) <= _numbers_of(newest):
            yield f"{name} {version} (tested: {oldest} to {newest})"


def warn_of_untested() -> None:
    """Warns of versions outside; the backend calls it when it is imported, so once in a process."""
    found = ", ".join(untested())
    if found:
        warnings.warn(
            f"river_compile was not tested with {found}; where something fails, install a tested version first",
            RiverWarning,
            stacklevel=2,
        )


def _numbers_of(version: str) -> tuple[int, ...]:
    """Returns the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
