"""The versions of Python and packages that River was tested with.

Not handled: which versions go together, which pip knows.
"""

from __future__ import annotations

import platform
import re
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import NamedTuple

from river_compile.errors import RiverWarning
from river_compile.kernels.messages import with_id

PYTHON = "Python"


class Tested(NamedTuple):
    oldest: str
    newest: str


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
