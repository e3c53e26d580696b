"""What `python -m build` and pip call: setuptools, and the C++ kernels in a wheel for this machine.

A wheel from a source archive has compiled kernels, which needs torch for its headers; `pip install .` in a checkout
compiles nothing. RIVER_COMPILE_KERNELS_IN_WHEEL=1 or 0 says otherwise. `_PYTHON_HOST_PLATFORM=linux-aarch64` builds for
another machine, with a cross compiler in CXX that finds that machine's libtorch_cpu.so. Not handled: machines that
`_tag` does not know, whose wheels carry sources alone, and tags for many distributions (auditwheel gives them).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the other hooks)

_ROOT = Path(__file__).parents[1]
_NEEDED = ("torch>=2.11", "filelock>=3.12", "numpy")  # numpy spares a warning of torch's
_OLDEST_MACOS = "11.0"  # torch's wheels say the same

Settings = Mapping[str, Any] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what a wheel's build needs besides setuptools."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *(_NEEDED if _tag() else ())]


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    """Build the wheel; return its name."""
    settings, tag = dict(config_settings or {}), _tag()
    if not tag:
        return build_meta.build_wheel(wheel_directory, settings, metadata_directory)
    given = settings.get("--build-option", [])
    settings["--build-option"] = [*([given] if isinstance(given, str) else given), f"--plat-name={tag}"]
    with _compiled():
        return build_meta.build_wheel(wheel_directory, settings, metadata_directory)


def _tag() -> str:
    """Return the platform of a wheel with compiled kernels, empty if the wheel carries sources alone."""
    asked = os.environ.get("RIVER_COMPILE_KERNELS_IN_WHEEL")
    wanted = (_ROOT / "PKG-INFO").exists() if asked is None else asked != "0"  # (which every source archive has)
    if not wanted:
        return ""
    with _importable():
        from river_compile.kernels.native.machine import ARM, X86, target_architecture
    machine = target_architecture()
    if sys.platform == "darwin" and machine == ARM:
        oldest = os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", _OLDEST_MACOS)  # the compiler reads it too
        return f"macosx_{oldest.replace('.', '_')}_arm64"
    return f"linux_{machine}" if sys.platform == "linux" and machine in (X86, ARM) else ""


@contextlib.contextmanager
def _compiled() -> Iterator[None]:
    """Inside, the libraries lie next to their sources, where the wheel takes them from."""
    with _importable():
        from river_compile.kernels.native.build import BUILT, build_all

        print(f"compiled kernels: {build_all(BUILT) / 1e6:.1f} MB")
    try:
        yield
    finally:
        shutil.rmtree(BUILT)


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Inside, the product is imported from this folder."""
    sys.path.insert(0, str(_ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(_ROOT))
